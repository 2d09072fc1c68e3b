"""sha256 of files, values, arrays and weights, all as hexadecimal digits, and the checksums of a folder's files."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from microcinema.utils.fingerprint import canonical

SUMS = "SHA256SUMS"
"""The file of checksums, in the format of `sha256sum -c`."""
_KEPT_FROM = 2**26  # bytes of files that take longer to hash than to look up
_THREADS = 8  # hashlib releases the interpreter's lock


def hash_chunks(chunks: Iterable[Any]) -> str:
    """sha256 of texts, bytes and one-dimensional buffers, one after the other."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk.encode() if isinstance(chunk, str) else chunk)
    return digest.hexdigest()


def hash_file(file: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes."""
    with open(file, "rb") as stream:
        return hash_chunks(iter(lambda: stream.read(1 << 20), b""))


def hash_array(array: Any) -> str:
    """sha256 of the bytes of an array or of an image's pixels, in row-major order; dtype and shape are not included."""
    return hash_chunks([np.ascontiguousarray(array).reshape(-1)])


def hash_json(content: Any) -> str:
    """sha256 of content in canonical JSON: sorted keys, rounded floats."""
    return hash_chunks([json.dumps(canonical(content), sort_keys=True)])


def hash_weights(network: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """sha256 over name, dtype, shape and bytes of every parameter and buffer in the state dict.

    It depends on the values in memory, not on a file's layout. Floating-point tensors are first cast to `dtype`, if given; otherwise float16
    and float32 copies differ.
    """

    def chunks() -> Iterable[Any]:
        for name, tensor in sorted(network.state_dict().items()):
            tensor = tensor.detach().to(dtype=dtype if tensor.is_floating_point() else None).cpu().contiguous()
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n"
            yield tensor.flatten().view(torch.uint8).numpy()

    return hash_chunks(chunks())


def hash_networks(components: Mapping[str, Any]) -> dict[str, str]:
    """`hash_weights` of those components of a pipeline that are networks, as they were opened.

    Those of large ones are kept in the user's cache folder, by path, size and time of their files and the first numbers of every weight.
    """
    return {name: _kept_hash(part) for name, part in components.items() if isinstance(part, torch.nn.Module)}


def _kept_hash(network: torch.nn.Module) -> str:
    folder = getattr(getattr(network, "config", None), "_name_or_path", None) or ""
    files = sorted(Path(folder).glob("*.safetensors")) if folder else []  # none: assembled here, or changed since
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if sum(size for _, size, _ in stats) < _KEPT_FROM:
        return hash_weights(network)
    weights = sorted(network.state_dict().items())
    key = hash_chunks([str(stats), *(f"{name} {w.dtype} {w.shape} {w.flatten()[:8].tolist()}" for name, w in weights)])
    store = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "microcinema" / "weights_sha256" / key
    try:
        if len(kept := store.read_text()) == 64:
            return kept
    except OSError:
        pass
    digest = hash_weights(network)
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(digest)
    return digest


def write_checksums(folder: str | os.PathLike[str]) -> None:
    """Writes `SHA256SUMS` of all other files in a folder and its subfolders."""
    root = Path(folder)
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    names = sorted(path.as_posix() for path in files if path != Path(SUMS))
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = threads.map(lambda name: hash_file(root / name), names)
        lines = [f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True)]
    (root / SUMS).write_text("".join(lines), encoding="utf-8")


def checksum_error(folder: str | os.PathLike[str]) -> str | None:
    """The first mismatch between a folder's files and its `SHA256SUMS`, in a few words; None if all files match."""
    root = Path(folder)
    try:
        lines = (root / SUMS).read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    except (OSError, ValueError):
        return f"{SUMS} is missing or cannot be read"

    def error(name: str) -> str | None:
        try:
            return None if hash_file(root / name) == expected[name] else f"{name} does not match its checksum"
        except OSError as reason:
            return f"{name}: {reason.strerror}"

    with ThreadPoolExecutor(_THREADS) as threads:
        errors = filter(None, threads.map(error, expected))
        return next(errors, None if expected else f"{SUMS} is empty")
