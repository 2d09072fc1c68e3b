"""Checksums of all files in a folder, in the file `SHA256SUMS`, which `sha256sum -c` reads as well."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = "SHA256SUMS"
_THREADS = 8  # hashlib lets go of the interpreter


def sha256_of(file: str | os.PathLike[str]) -> str:
    """Of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_checksums(folder: str | os.PathLike[str]) -> None:
    """Writes the checksums of every other file that is now in a folder and the folders in it."""
    root = Path(folder)
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    names = sorted(path.as_posix() for path in files if path != Path(SUMS))
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = threads.map(lambda name: sha256_of(root / name), names)
        lines = [f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True)]
    (root / SUMS).write_text("".join(lines), encoding="utf-8")


def find_fault(folder: str | os.PathLike[str]) -> str | None:
    """What is wrong with the files of a folder by its checksums, in a few words; None: they are as they were written."""
    root = Path(folder)
    try:
        lines = (root / SUMS).read_text(encoding="utf-8").splitlines()
        wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    except (OSError, ValueError):
        return f"{SUMS} is missing or cannot be read"

    def fault(name: str) -> str | None:
        try:
            return None if sha256_of(root / name) == wanted[name] else f"{name} is not as it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"

    with ThreadPoolExecutor(_THREADS) as threads:
        return next((found for found in threads.map(fault, wanted) if found), None if wanted else f"{SUMS} is empty")
