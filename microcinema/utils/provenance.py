"""Where a result comes from: hashes of weights, versions, the commit of the code; as a record beside its files."""

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from microcinema import __version__
from microcinema.utils.files import atomic_path

LIBRARIES = ("torch", "diffusers", "transformers")
TRAINING_LIBRARIES = ("accelerate", "safetensors", "numpy", "av")


def hash_weights(module: torch.nn.Module) -> str:
    """sha256 over name, type, shape and bytes of every parameter and buffer that is saved.

    Of what is in memory, not of a file: one and the same for a local folder, a hub repository and a network just trained.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_networks(components: Mapping[str, Any]) -> dict[str, str]:
    """`hash_weights` of those components of a pipeline that are networks."""
    return {name: hash_weights(part) for name, part in components.items() if isinstance(part, torch.nn.Module)}


def describe_code() -> dict[str, Any]:
    """Versions of this package, Python and the libraries that decide the numbers, and the git commit of a checkout.

    The commit ends in `-dirty` if files differ from it; it is None for an installed package.
    """
    libraries = {name: version(name) for name in LIBRARIES}
    return {"microcinema": __version__, "commit": _commit(), "python": platform.python_version(), **libraries}


def describe_environment(num_processes: int) -> dict[str, Any]:
    """What a run of training runs on: `describe_code`, the libraries that read and spread it, the machine of this process, the time.

    Args:
        num_processes: of the run, over all machines.
    """
    libraries = {name: version(name) for name in TRAINING_LIBRARIES}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **describe_code(),
        **libraries,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "num_processes": num_processes,
    }


def append_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Adds an entry to a JSON list in a file, whole or not at all; what is there and no list is replaced."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        entries = []
    with atomic_path(path) as temporary:
        entries = [*(entries if isinstance(entries, list) else []), record]
        temporary.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def write_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Writes a provenance as JSON, whole or not at all. Its entry `files` names what it belongs to, beside it."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(path: str | os.PathLike[str], wanted: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """A provenance that stands; None if there is none, if it does not say what is wanted, or if a file that it belongs to is missing.

    Args:
        wanted: entries that it must have, with these values; it may have others.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or "files" not in record:
        return None
    if any(key not in record or record[key] != value for key, value in json.loads(json.dumps(wanted or {})).items()):
        return None
    there = all((Path(path).parent / name).is_file() for name in record["files"].values())
    return record if there else None


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    # A checkout of this package, not some other repository that it happens to be installed under.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
