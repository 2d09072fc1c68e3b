"""Where a result comes from: hashes of weights, versions, the commit of the code."""

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from microcinema import __version__

LIBRARIES = ("torch", "diffusers", "transformers")


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


def _commit() -> str | None:
    root = Path(__file__).parents[1]
    # A checkout of this package, not some other repository that it happens to be installed under.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
