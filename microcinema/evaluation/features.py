"""Clips to what detectors say of them, batch by batch: resumable, by any number of processes, memory the same for any number of clips."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from microcinema.evaluation.detectors import Batch, Measure
from microcinema.evaluation.generate import Share
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path
from microcinema.utils.fingerprint import write_or_verify

_READERS = 8  # threads that read clips while the detectors are at work; decoding leaves Python's lock


@dataclass(frozen=True)
class Clips:
    """A set of clips to measure: how many, one by its number, and their prompts, where they have some.

    `load` gives frames uint8 (f, h, w, 3), all of one shape, and the key frame uint8 (h, w, 3), or None.
    """

    count: int
    load: Callable[[int], tuple[np.ndarray, np.ndarray | None]]
    prompts: Sequence[str] | None = None


def extract(
    clips: Clips,
    measures: Sequence[Measure],
    folder: str | os.PathLike[str],
    identity: Mapping[str, Any],
    batch_size: int,
    share: Share,
    label: str,
    progress: bool = True,
) -> None:
    """Runs every measure on every clip of this process's share, and stores what it says in one file a batch.

    Args:
        identity: what the result depends on, as JSON; kept in the folder.
        label: of the progress bar.

    Raises:
        UserError: the folder holds another set's result, a clip cannot be read, or a detector refuses it.
    """
    write_or_verify(folder, identity, "choose another output_dir or evaluation.real_features_dir")
    missing = [batch for batch in share.batches(clips.count, batch_size) if not _path(folder, batch).exists()]
    total = sum(map(len, missing))
    with (
        ThreadPoolExecutor(_READERS) as pool,
        tqdm(total=total, desc=label, unit="clip", disable=not progress or not total) as bar,
    ):
        # One batch is read ahead, and no more: what is in memory does not grow with the number of clips.
        coming = [pool.submit(clips.load, index) for index in missing[0]] if missing else []
        for number, batch in enumerate(missing):
            reading, coming = coming, []
            if number + 1 < len(missing):
                coming = [pool.submit(clips.load, index) for index in missing[number + 1]]
            try:
                found = _measured(clips, batch, [future.result() for future in reading], measures)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            with atomic_path(_path(folder, batch)) as path:
                np.savez(path, **found)  # type: ignore[arg-type]
            bar.update(len(batch))


def _measured(
    clips: Clips, batch: range, read: Sequence[tuple[np.ndarray, np.ndarray | None]], measures: Sequence[Measure]
) -> dict[str, np.ndarray]:
    keyframes = [keyframe for _, keyframe in read if keyframe is not None]
    together = Batch(
        np.stack([frames for frames, _ in read]),
        None if clips.prompts is None else [clips.prompts[index] for index in batch],
        np.stack(keyframes) if keyframes else None,
    )
    found: dict[str, np.ndarray] = {}
    for measure in measures:
        found |= measure(together)
    return found


@dataclass(frozen=True)
class Features:
    """What `extract` stored, in the order of the clips' numbers, whichever process measured them."""

    folder: Path
    count: int
    batch_size: int

    def batches(self, name: str) -> Iterator[np.ndarray]:
        """One array (b, ...) after the other.

        Raises:
            UserError: a file is missing or damaged.
        """
        for batch in Share().batches(self.count, self.batch_size):
            path = _path(self.folder, batch)
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    yield arrays[name]
            except (OSError, ValueError, KeyError, BadZipFile) as error:
                raise UserError(f"cannot read the features '{path}' ({error}); delete it and evaluate again") from None

    def all(self, name: str) -> np.ndarray:
        """All of them, (n, ...)."""
        return np.concatenate(list(self.batches(name)))

    @property
    def names(self) -> list[str]:
        """Of the arrays."""
        with np.load(_path(self.folder, range(min(self.count, self.batch_size)))) as arrays:
            return list(arrays.files)


def _path(folder: str | os.PathLike[str], batch: range) -> Path:
    return Path(folder) / f"{batch.start:06d}.npz"
