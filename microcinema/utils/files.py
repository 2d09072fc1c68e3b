"""Listing files in one order, and writing those that a killed process leaves either old or new, never half-written."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from microcinema.utils.errors import UserError


def natural_key(path: str | os.PathLike[str]) -> Any:
    """Sorts paths by folder, then by name, with numbers by their value: 2.mp4 before 10.mp4, clip_9 before clip_10."""
    folder, name = os.path.split(path)
    texts = [re.split("([0-9]+)", text) for text in (name, *Path(folder).parts)]  # texts and numbers alternate
    keys = [[int(part) if k % 2 else part for k, part in enumerate(parts)] for parts in texts]
    return keys[1:], keys[0], os.fspath(path)


def list_files(folder: str | os.PathLike[str], suffixes: Collection[str], pattern: str = "*") -> list[Path]:
    """The files of a folder that have one of these suffixes, in any case, in the order of `natural_key`; hidden ones are skipped."""
    files = (path for path in Path(folder).glob(pattern) if path.suffix.lower() in suffixes and path.is_file())
    return sorted((path for path in files if not path.name.startswith(".")), key=natural_key)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Creates a folder and its parents; a UserError if this fails, or if no files can be written into it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to folder '{folder}' ({error.strerror}); choose another one") from None
    return folder


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with the same suffix; renames it over `path` on success, deletes it on failure."""
    final = Path(path)
    make_folder(final.parent)
    temporary = final.with_name(f".{final.stem}.{os.getpid()}.partial{final.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, final)
        _sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes content as indented JSON with `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it replaces `path`, on failure it is removed.

    An existing folder is renamed first and deleted last, so that one complete folder exists at every moment.
    """
    final = Path(path)
    make_folder(final.parent)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.partial")
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if final.exists():
            os.replace(final, old)
        os.replace(temporary, final)
        _sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Removes what killed processes left incomplete in a folder, to which nothing may be writing.

    A folder that was renamed for a new one that never replaced it gets its name back.
    """
    for path in Path(folder).glob(".*.old"):
        final = path.with_name(path.name.removeprefix(".").rsplit(".", 2)[0])
        if path.is_dir() and not final.exists():
            os.replace(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in Path(folder).glob(".*.partial*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
