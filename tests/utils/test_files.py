"""Files and folders are written whole or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_folder, atomic_path, list_files, make_folder, natural_key, sweep


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["{}.mp4", "sample_{}.mp4", "clip{}-0.mp4", "2026-11-{}.mp4", "{}/a.mp4", "v{}.1.mp4"])
def test_numbers_in_names_count_as_numbers(name: str):
    paths = [name.format(k) for k in range(12)]
    assert sorted(paths, key=natural_key) == paths
    assert sorted(map(Path, paths), key=natural_key) == list(map(Path, paths))


def test_files_are_listed_in_natural_order_without_hidden_ones(tmp_path: Path):
    for name in ("10.png", "9.PNG", "a/1.png", "01.png", "1.png", "._1.png", "b1.png", "x.txt", "²3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "5.png").mkdir()
    expected = ["01.png", "1.png", "9.PNG", "10.png", "b1.png", "²3.png"]
    assert [file.name for file in list_files(tmp_path, (".png",))] == expected
    everywhere = list_files(tmp_path, (".png",), "**/*")
    assert [file.relative_to(tmp_path).as_posix() for file in everywhere] == [*expected, "a/1.png"]


def test_a_file_appears_when_it_is_whole(tmp_path: Path):
    final = tmp_path / "new" / "report.json"
    with atomic_path(final) as temporary:
        assert temporary.parent == final.parent
        assert temporary.suffix == ".json"
        temporary.write_text("whole")
        assert not final.exists()
    assert final.read_text() == "whole"
    assert names(final.parent) == ["report.json"]


def test_an_error_leaves_the_old_file(tmp_path: Path):
    final = tmp_path / "report.json"
    final.write_text("old")

    def half() -> None:
        with atomic_path(final) as temporary:
            temporary.write_text("ha")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        half()
    assert final.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path):
    final = tmp_path / "model"
    for content in ("old", "new"):
        with atomic_folder(final) as temporary:
            (temporary / "unet").mkdir()
            (temporary / "unet" / f"{content}.txt").write_text(content)
    assert [path.name for path in final.rglob("*.txt")] == ["new.txt"]
    assert names(tmp_path) == ["model"]


def test_an_error_leaves_the_old_folder(tmp_path: Path):
    final = tmp_path / "model"
    final.mkdir()
    (final / "weights").write_text("old")

    def half() -> None:
        with atomic_folder(final) as temporary:
            (temporary / "weights").write_text("ha")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        half()
    assert (final / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("writer", ["atomic_path", "atomic_folder"])
def test_a_killed_process_leaves_the_old_one(writer: str, tmp_path: Path):
    final = tmp_path / "thing"
    code = f"""
import os, signal, sys
from pathlib import Path
from microcinema.utils.files import {writer}
for content in ("old", "new"):
    with {writer}(sys.argv[1]) as temporary:
        file = temporary / "weights" if temporary.is_dir() else temporary
        file.write_text(content)
        if content == "new":
            os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(final)])
    assert done.returncode == -signal.SIGKILL
    assert (final / "weights" if writer == "atomic_folder" else final).read_text() == "old"
    assert len(names(final.parent)) == 2
    sweep(final.parent)
    assert names(final.parent) == [final.name]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write to folder"):
            make_folder(place)
    with pytest.raises(UserError, match="cannot write to folder"), atomic_path(tmp_path / "file" / "report.json"):
        raise AssertionError("the body must not run")


def test_make_folder_leaves_nothing_inside(tmp_path: Path):
    assert names(make_folder(tmp_path / "a" / "b")) == []


def test_a_folder_that_was_renamed_away_gets_its_name_back_unless_another_has_it(tmp_path: Path):
    """As `atomic_folder` leaves it when it is killed between its two renames, and after them."""
    for name in (".lost.12.old", ".lost.12.partial", "there", ".there.34.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / ".report.56.partial.json").write_text("{")
    (tmp_path / ".hidden").write_text("not ours")
    sweep(tmp_path)
    assert names(tmp_path) == [".hidden", "lost", "there"]
    assert [(tmp_path / name / "weights").read_text() for name in ("lost", "there")] == [".lost.12.old", "there"]
