"""Which checkpoints a run has, and the one that it goes on from."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microcinema.utils.errors import UserError
from microcinema.utils.hashing import SUMS, find_fault

STATE = "training_state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        clips: number of the next clip in the global order.
    """

    step: int
    clips: int


def find_checkpoints(output_dir: str | os.PathLike[str], up_to: float = float("inf")) -> list[Path]:
    """The checkpoints of a run, oldest first.

    Args:
        up_to: the last step that counts.
    """
    steps = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and int(match[1]) <= up_to and is_checkpoint(folder):
            steps[int(match[1])] = folder
    return [steps[step] for step in sorted(steps)]


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is there, whole or not."""
    return any((Path(folder) / name).is_file() for name in (STATE, SUMS))


def read_progress(folder: str | os.PathLike[str]) -> Progress:
    """How far the run had come when it wrote a checkpoint.

    Raises:
        UserError: it cannot be read.
    """
    return Progress(**read_state(Path(folder))["progress"])


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise UserError(f"checkpoint '{folder}' cannot be read ({said}); use another one") from None


def choose_checkpoint(
    output_dir: str | os.PathLike[str],
    resume_from_checkpoint: str | None,
    say: Callable[[str], None] = print,
) -> Path | None:
    """The checkpoint to continue from, or None for a new run. Its files are held against their checksums.

    `latest` in a folder without any is a new run, so that one command line serves a job that is started again and again. A
    newest one that is broken is passed over.

    Args:
        say: is told of broken checkpoints, each in a line.

    Raises:
        UserError: the named checkpoint is not there or broken, all are broken, or a new run would mix its checkpoints with
            those of an earlier one.
    """
    found = find_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if found:
            raise UserError(
                f"'{output_dir}' already holds {found[-1].name}; set resume_from_checkpoint=latest, or choose another output_dir"
            )
        return None
    if resume_from_checkpoint == "latest":
        for folder in reversed(found):
            if (fault := find_fault(folder)) is None:
                return folder
            say(f"{folder.name} is broken ({fault}); trying the one before")
        if found:
            raise UserError(
                f"none of the {len(found)} checkpoints in '{output_dir}' is whole; begin again in another output_dir"
            )
        return None
    path = Path(resume_from_checkpoint)
    if not is_checkpoint(path):
        there = ", ".join(folder.name for folder in found) or "none"
        raise UserError(f"'{path}' is not a checkpoint (no {STATE} in it); '{output_dir}' holds: {there}")
    if (fault := find_fault(path)) is not None:
        raise UserError(f"checkpoint '{path}' is broken ({fault}); set resume_from_checkpoint=latest, or name another")
    return path
