"""Listing files in one order, and writing those that a killed process leaves either old or new, never half-written."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from microcinema.utils.errors import UserError

LOCK = ".microcinema.lock"
# Marks of what is not finished, behind the process that writes it.
_PARTIAL, _OLD = "microcinema-partial", "microcinema-old"


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
def lock_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Creates a folder and holds it for this process alone; in the end, folders that it has created and are empty are removed.

    The system releases the lock of a process that was killed; the file keeps its host, number and start, which are told. A UserError if it
    cannot be written, or another process holds it.
    """
    folder = Path(path)
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    file = make_folder(folder) / LOCK
    with open(file, "a+", encoding="utf-8") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                message = f"'{folder}' is in use by {lock.read()}"
                raise UserError(f"{message}; wait until it has ended, or choose another folder") from None
            print(f"'{folder}' cannot be locked ({error.strerror}): start nothing else in it", file=sys.stderr)
        lock.seek(0)
        if owner := lock.read():
            print(f"'{folder}' is taken over from {owner}, which was killed", file=sys.stderr)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            for parent in created:
                with suppress(OSError):  # something is in it
                    parent.rmdir()


def partial(final: Path, suffix: str = "", mark: str = _PARTIAL) -> Path:
    """The name, beside `final`, of a file or folder that this process has not finished; `sweep` removes it once the process is gone."""
    return final.with_name(f".{final.name.removesuffix(suffix)}.{os.getpid()}.{mark}{suffix}")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with the same suffix; renames it over `path` on success, deletes it on failure."""
    final = Path(path)
    make_folder(final.parent)
    temporary = partial(final, final.suffix)
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
    temporary, old = partial(final), partial(final, mark=_OLD)
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


def sweep(folder: str | os.PathLike[str], remove: bool = True) -> None:
    """Removes what processes of this package that are gone have left incomplete in a folder.

    A folder that was renamed for a new one that never replaced it gets its name back; with `remove=False` nothing else happens.
    """
    for path in Path(folder).glob(".*"):
        match = re.fullmatch(rf"\.(.+)\.(\d+)\.({_PARTIAL}|{_OLD})(\.[^.]*)?", path.name)
        if match is None or (int(match[2]) != os.getpid() and psutil.pid_exists(int(match[2]))):
            continue
        final = path.with_name(match[1])
        if match[3] == _OLD and path.is_dir() and not final.exists():
            os.replace(path, final)
        elif remove and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif remove:
            path.unlink(missing_ok=True)
