"""Files and folders are written whole or not at all."""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from microcinema.utils.errors import UserError
from microcinema.utils.files import (
    LOCK,
    atomic_folder,
    atomic_path,
    list_files,
    lock_folder,
    make_folder,
    natural_key,
    sweep,
)


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


GONE, THERE = 2**22 + 1, 1  # a number that no process of Linux has, and one that some other process always has


def test_a_folder_that_was_renamed_away_gets_its_name_back_unless_another_has_it(tmp_path: Path):
    """As `atomic_folder` leaves it when it is killed between its two renames, and after them."""
    left = (
        f".lost.{GONE}.microcinema-old",
        f".lost.{GONE}.microcinema-partial",
        "there",
        f".there.{GONE}.microcinema-old",
    )
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / f".report.{GONE}.microcinema-partial.json").write_text("{")
    sweep(tmp_path, remove=False)
    assert names(tmp_path) == sorted({"lost", *left, f".report.{GONE}.microcinema-partial.json"} - {left[0]})
    sweep(tmp_path)
    assert names(tmp_path) == ["lost", "there"]
    assert [(tmp_path / name / "weights").read_text() for name in ("lost", "there")] == [left[0], "there"]


def test_what_is_not_marked_as_ours_or_has_a_living_owner_stays(tmp_path: Path):
    theirs = [
        ".hidden",
        ".notes.old",
        ".notes.12.old",
        ".notes.partial",
        ".report.56.partial.json",
        ".x.microcinema-partial",
    ]
    living = [f".checkpoint-4.{THERE}.microcinema-partial", f".a.{THERE}.microcinema-partial.tar"]
    for name in (*theirs, *living):
        (tmp_path / name).write_text("precious")
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*theirs, *living])


HOLDER = """
import os, signal, sys, time
from microcinema.utils.files import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the folder `run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def test_a_folder_is_held_by_one_process_and_taken_over_from_one_that_was_killed(tmp_path: Path, holder, capsys):
    owner = f"process {holder.pid} on {socket.gethostname()}, started 20"
    with (
        pytest.raises(UserError, match=f"run' is in use by {re.escape(owner)}.*; wait until"),
        lock_folder(tmp_path / "run"),
    ):
        raise AssertionError("two processes in one folder")
    assert names(tmp_path / "run") == [LOCK]
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path / "run"):
        assert f"run' is taken over from {owner}" in capsys.readouterr().err
        assert f"process {os.getpid()} on" in (tmp_path / "run" / LOCK).read_text()
    assert names(tmp_path / "run") == []
    with lock_folder(tmp_path / "run"):
        assert capsys.readouterr().err == ""


def test_a_locked_folder_stays_if_it_was_there_or_has_something_in_it(tmp_path: Path):
    (tmp_path / "there").mkdir()
    for name in ("there", "new/deep", "full/deep"):
        with lock_folder(tmp_path / name):
            (tmp_path / "full/deep/model").mkdir(parents=True, exist_ok=True)
    assert names(tmp_path) == ["full", "there"]


def test_a_folder_that_vanishes_or_whose_locks_are_not_supported_is_no_obstacle(tmp_path: Path, monkeypatch, capsys):
    with lock_folder(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr("fcntl.lockf", raises(OSError(errno.ENOLCK, "No locks available")))
    with lock_folder(tmp_path / "run"):
        assert "run' cannot be locked (No locks available)" in capsys.readouterr().err


def raises(error: Exception):
    def function(*_):
        raise error

    return function
