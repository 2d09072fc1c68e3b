"""Records of what a result depends on: equal, different, damaged, missing."""

import json

import pytest

from microcinema.utils.errors import UserError
from microcinema.utils.files import write_json
from microcinema.utils.fingerprint import FINGERPRINT, differences, matches, read_record, write_or_verify


def test_differences_name_each_key_with_both_values():
    actual = {"seed": 3, "vae": {"sha256": "a" * 64, "scale": 0.5}, "prompt": "a cat", "old": 1}
    expected = {"seed": 4, "vae": {"sha256": "b" * 64, "scale": 0.5}, "prompt": "x" * 50, "new": [1, 2], "none": None}
    assert differences(expected, actual) == [
        "seed was 3 and is 4",
        "vae.sha256 was aaaaaaaaaaaa... and is bbbbbbbbbbbb...",
        f"prompt was a cat and is {'x' * 40}...",
        "new was null and is [1, 2]",
        "old was 1 and is null",
    ]


def test_common_keys_alone_can_be_compared():
    actual, expected = {"vae": {"sha256": "a", "files": "b"}, "flow": 1}, {"vae": {"sha256": "a"}, "text": 2}
    assert differences(expected, actual, common_only=True) == []
    assert differences({"flow": 2}, actual, common_only=True) == ["flow was 1 and is 2"]


def test_rounding_errors_and_tuples_are_no_differences():
    assert differences({"angle": 0.1 + 0.2, "size": (64, 64)}, {"angle": 0.3, "size": [64, 64]}) == []
    assert differences({"learning_rate": 1e-5}, {"learning_rate": 1.001e-5})


def test_folder_is_marked_once_and_then_verified(tmp_path):
    folder = tmp_path / "features"
    assert not matches(folder, {"seed": 3})
    for _ in range(2):
        write_or_verify(folder, {"seed": 3, "size": (8, 16)})
    assert json.loads((folder / FINGERPRINT).read_text()) == {"seed": 3, "size": [8, 16]}
    assert matches(folder, {"size": [8, 16], "seed": 3})
    assert not matches(folder, {"seed": 3})
    with pytest.raises(UserError) as error:
        write_or_verify(folder, {"seed": 4, "size": (8, 16)}, "choose another one")
    assert str(error.value) == f"'{folder}' holds other results (seed was 3 and is 4); choose another one"
    (folder / FINGERPRINT).write_text("{")
    assert not matches(folder, {"seed": 3})
    with pytest.raises(UserError, match=r"fingerprint.json' is damaged; delete the folder"):
        write_or_verify(folder, {"seed": 3})


def test_record_is_read_if_it_has_the_expected_entries_and_its_files_exist(tmp_path):
    path = tmp_path / "a.json"
    (tmp_path / "a.mp4").touch()
    record = {"seed": 3, "size": {"height": 8, "width": 16}, "files": {"video": "a.mp4"}}
    write_json(path, record)
    assert read_record(path) == read_record(path, needs_files=True) == record
    assert read_record(path, {"size": {"width": 16, "height": 8}}) == record
    assert read_record(path, {"seed": 3, "size": {"height": 8}}) is None
    assert read_record(path, {"seed": 4}) is None
    assert read_record(path, {"negative_prompt": None}) is None  # an entry that is absent is not known to be null
    (tmp_path / "a.mp4").unlink()
    assert read_record(path) == record
    assert read_record(path, needs_files=True) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff"])
def test_damaged_record_is_none(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_record(tmp_path / "a.json") is None
    assert read_record(tmp_path / "b.json") is None


def test_record_without_files_does_not_stand_for_files(tmp_path):
    write_json(tmp_path / "a.json", {"seed": 3})
    assert read_record(tmp_path / "a.json", needs_files=True) is None
