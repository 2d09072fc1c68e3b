"""Where a result comes from: versions of the libraries, commit of the code, the machine."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from microcinema import __version__
from microcinema.utils.files import write_json

LIBRARIES = ("torch", "diffusers", "transformers")
TRAINING_LIBRARIES = ("accelerate", "safetensors", "numpy", "av")


def describe_code() -> dict[str, Any]:
    """Versions of the package, Python and the main libraries, and the commit (`-dirty` if files differ from it; None if installed)."""
    libraries = {name: version(name) for name in LIBRARIES}
    return {"microcinema": __version__, "commit": _commit(), "python": platform.python_version(), **libraries}


def describe_environment(num_processes: int) -> dict[str, Any]:
    """Versions, commit, time and machine of a training run with so many processes on all machines."""
    libraries = {name: version(name) for name in TRAINING_LIBRARIES}
    return {
        "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
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
    """Appends an entry to a JSON list in a file, atomically; a file that holds no list is replaced."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        entries = []
    write_json(path, [*(entries if isinstance(entries, list) else []), record])


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    # A checkout of this package, not some other repository that it happens to be installed under.
    if not (root / ".git").exists():
        return None
    # Without git's own lock, which a killed run would leave behind.
    describe = ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    command = ["git", "--no-optional-locks", "-C", str(root), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
