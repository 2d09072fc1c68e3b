"""Features of clips by detectors, batch by batch: resumable, by any number of processes, in constant memory."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from microcinema.evaluation.detectors import Batch, Measure
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path
from microcinema.utils.fingerprint import write_or_verify

_READERS = 8  # threads that decode clips while the detectors run; decoding releases Python's lock


@dataclass(frozen=True)
class Clips:
    """A set of clips to measure. `load` returns the frames of one, uint8 (f, h, w, 3), all of one shape, and its key frame uint8
    (h, w, 3), with which the frame `keyframe_index` is compared, or None."""

    count: int
    load: Callable[[int], tuple[np.ndarray, np.ndarray | None]]
    prompts: Sequence[str] | None = None
    keyframe_index: int = 0


def extract_features(
    clips: Clips,
    measures: Sequence[Measure],
    folder: str | os.PathLike[str],
    fingerprint: Mapping[str, Any],
    batch_size: int,
    label: str,
    rank: int = 0,
    num_processes: int = 1,
    progress: bool = True,
) -> "Features":
    """Runs every measure on the batches of this process, every `num_processes`-th from `rank`, and stores the features in one file per
    batch. The folder keeps the fingerprint: everything that they depend on. Returns the features of all clips, for when all processes are done.

    Raises:
        UserError: the folder holds features with another fingerprint, a clip cannot be read, or a detector refuses it.
    """
    write_or_verify(folder, fingerprint, "choose another output_dir or evaluation.real_features_dir")
    mine = _batches(clips.count, batch_size)[rank::num_processes]  # so that batches do not depend on the processes
    missing = [batch for batch in mine if not _path(folder, batch).exists()]
    total, silent = sum(map(len, missing)), not progress or not missing
    with ThreadPoolExecutor(_READERS) as pool, tqdm(total=total, desc=label, unit="clip", disable=silent) as bar:
        # One batch is read ahead and no more, so that memory does not grow with the number of clips.
        def submit(batches: Sequence[range]) -> list[Future[tuple[np.ndarray, np.ndarray | None]]]:
            return [pool.submit(clips.load, index) for batch in batches[:1] for index in batch]

        pending = submit(missing)
        for number, batch in enumerate(missing):
            reading, pending = pending, submit(missing[number + 1 :])
            try:
                features = _measure(clips, batch, [future.result() for future in reading], measures)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            with atomic_path(_path(folder, batch)) as path:
                np.savez(path, **features)  # type: ignore[arg-type]
            bar.update(len(batch))
    return Features(Path(folder), clips.count, batch_size)


def _measure(
    clips: Clips, indices: range, loaded: Sequence[tuple[np.ndarray, np.ndarray | None]], measures: Sequence[Measure]
) -> dict[str, np.ndarray]:
    keyframes = [keyframe for _, keyframe in loaded if keyframe is not None]
    batch = Batch(
        np.stack([frames for frames, _ in loaded]),
        None if clips.prompts is None else [clips.prompts[index] for index in indices],
        np.stack(keyframes) if keyframes else None,
        clips.keyframe_index,
    )
    return {name: values for measure in measures for name, values in measure(batch).items()}


@dataclass(frozen=True)
class Features:
    """The stored features of a set of clips, in the order of the clips."""

    folder: Path
    count: int
    batch_size: int

    def batches(self, name: str) -> Iterator[np.ndarray]:
        """Yields an array (b, ...) for each batch; a UserError if its file is missing or damaged."""
        for batch in _batches(self.count, self.batch_size):
            path = _path(self.folder, batch)
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    yield arrays[name]
            except (OSError, ValueError, KeyError, BadZipFile) as error:
                raise UserError(f"cannot read the features '{path}' ({error}); delete it and evaluate again") from None

    def all(self, name: str) -> np.ndarray:
        """The array of all clips, (n, ...)."""
        return np.concatenate(list(self.batches(name)))

    @property
    def names(self) -> list[str]:
        with np.load(_path(self.folder, range(min(self.count, self.batch_size)))) as arrays:
            return list(arrays.files)


def _batches(count: int, batch_size: int) -> list[range]:
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def _path(folder: str | os.PathLike[str], batch: range) -> Path:
    return Path(folder) / f"{batch.start:06d}.npz"
