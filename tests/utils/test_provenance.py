"""Hashes, the description of the code, and records that stand or do not."""

import json

import pytest
import torch

from microcinema.utils import provenance


def test_hashes_follow_the_weights():
    network = torch.nn.Linear(2, 2)
    before = provenance.hash_weights(network)
    assert provenance.hash_weights(network) == before
    with torch.no_grad():
        network.bias[0] += 1e-6
    assert provenance.hash_weights(network) != before
    assert provenance.hash_weights(network.half()) != provenance.hash_weights(network.float())


def test_code_is_described():
    found = provenance.describe_code()
    assert set(found) == {"microcinema", "commit", "python", *provenance.LIBRARIES}
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40


def test_each_start_of_a_run_adds_what_it_runs_on(tmp_path):
    path = tmp_path / "environment.json"
    for processes in (8, 16):
        provenance.append_record(path, provenance.describe_environment(processes))
    starts = json.loads(path.read_text())
    assert [start["num_processes"] for start in starts] == [8, 16]
    assert starts[0].keys() >= {*provenance.describe_code(), "accelerate", "cuda", "gpus", "platform", "time"}
    path.write_text("[half")  # nothing can be added to that
    provenance.append_record(path, {"num_processes": 4})
    assert json.loads(path.read_text()) == [{"num_processes": 4}]


def test_a_record_stands_if_it_says_what_is_wanted_and_its_files_are_there(tmp_path):
    path = tmp_path / "a.json"
    (tmp_path / "a.mp4").touch()
    record = {"seed": 3, "size": {"height": 8, "width": 16}, "files": {"video": "a.mp4"}}
    provenance.write_record(path, record)
    assert provenance.read_record(path) == record
    assert provenance.read_record(path, {"size": {"width": 16, "height": 8}}) == record
    assert provenance.read_record(path, {"seed": 3, "size": {"height": 8}}) is None
    assert provenance.read_record(path, {"seed": 4}) is None
    assert (
        provenance.read_record(path, {"negative_prompt": None}) is None
    )  # what it does not mention it cannot vouch for
    provenance.write_record(path, {**record, "numbers": (1, 2)})
    assert provenance.read_record(path, {"numbers": (1, 2)}) is not None  # tuples are lists in JSON
    (tmp_path / "a.mp4").unlink()
    assert provenance.read_record(path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", json.dumps({"seed": 3}), b"\xff"])
def test_what_is_no_record_does_not_stand(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert provenance.read_record(tmp_path / "a.json") is None
    assert provenance.read_record(tmp_path / "b.json") is None
