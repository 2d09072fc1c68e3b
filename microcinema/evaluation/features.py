"""Features of clips by detectors, batch by batch: resumable, by any number of processes, in constant memory."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from microcinema.evaluation.detectors import Batch, Measure
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import atomic_path
from microcinema.utils.fingerprint import write_or_verify
from microcinema.utils.hashing import hash_json

ClipFrames = tuple[np.ndarray, np.ndarray | None]
_SHOWN = 5  # faults that a message names
_READERS = 8  # threads that decode clips while the detectors run; decoding releases Python's lock


@dataclass(frozen=True, order=True)
class Fault:
    """A clip that cannot be read: its number among the clips, and why."""

    clip: int
    reason: str


class UnreadableClips(UserError):
    """Names the first clips that cannot be read; `faults` are all of them, in their order."""

    def __init__(self, faults: Sequence[Fault], count: int):
        self.faults = sorted(faults)
        shown = "; ".join(fault.reason for fault in self.faults[:_SHOWN])
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        super().__init__(f"{len(faults)} of {count} clips cannot be read: {shown}{more}")


@dataclass(frozen=True)
class Clips:
    """A set of clips to measure. `load` returns the frames of one, uint8 (f, h, w, 3), all of one shape, and its key frame uint8
    (h, w, 3), with which the frame `keyframe_index` is compared, or None.

    Attributes:
        names: what tells each clip from any other, so that the features of a clip that was replaced are measured anew.
        numbers: of each clip in the whole set, increasing; None: 0, 1, ... A clip that is left out changes no batch but its own.
    """

    names: Sequence[str]
    load: Callable[[int], tuple[np.ndarray, np.ndarray | None]]
    prompts: Sequence[str] | None = None
    keyframe_index: int = 0
    numbers: Sequence[int] | None = None

    def batches(self, size: int) -> dict[str, list[int]]:
        """Clips whose numbers lie between two multiples of `size`, by the name of the file of their features."""
        numbers = range(len(self.names)) if self.numbers is None else self.numbers
        batches: dict[int, list[int]] = {}
        for index, number in enumerate(numbers):
            batches.setdefault(number - number % size, []).append(index)
        content = {start: [(numbers[i], self.names[i]) for i in batch] for start, batch in batches.items()}
        return {f"{start:06d}-{hash_json(content[start])[:8]}.npz": batch for start, batch in batches.items()}


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
    gather: Callable[[list[Fault]], list[Fault]] = lambda faults: faults,
) -> "Features":
    """Runs every measure on the batches of this process, every `num_processes`-th from `rank`, and stores the features in one file per
    batch. The folder keeps the fingerprint: everything that they depend on, beside the clips' names.

    Args:
        gather: the faults of all processes from those of each one.

    Returns:
        the features of all clips, for when all processes are done.

    Raises:
        UnreadableClips: of all processes, when everything else is measured.
        UserError: the folder holds features with another fingerprint, or a detector refuses a clip.
    """
    write_or_verify(folder, fingerprint, "choose another output_dir or evaluation.real_features_dir")
    batches = clips.batches(batch_size)  # which do not depend on the number of processes
    paths = [Path(folder) / name for name in batches]
    share = list(zip(paths, batches.values(), strict=True))[rank::num_processes]
    missing = [(path, batch) for path, batch in share if not path.exists()]
    total, silent = sum(len(batch) for _, batch in missing), not progress or not missing
    faults: list[Fault] = []
    with ThreadPoolExecutor(_READERS) as pool, tqdm(total=total, desc=label, unit="clip", disable=silent) as bar:
        # One batch is read ahead and no more, so that memory does not grow with the number of clips.
        def submit(number: int) -> list[Future[ClipFrames | Fault]]:
            return [pool.submit(_load, clips, index) for _, batch in missing[number : number + 1] for index in batch]

        pending = submit(0)
        for number, (path, batch) in enumerate(missing):
            reading, pending = pending, submit(number + 1)
            try:
                features = _measure(clips, batch, [future.result() for future in reading], measures, faults)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            if features is not None:
                with atomic_path(path) as temporary:
                    np.savez(temporary, **features)  # type: ignore[arg-type]
            bar.update(len(batch))
    if faults := gather(faults):
        raise UnreadableClips(faults, len(clips.names))
    return Features(paths)


def _load(clips: Clips, index: int) -> ClipFrames | Fault:
    try:
        return clips.load(index)
    except UserError as error:
        return Fault(index, str(error))


def _measure(
    clips: Clips,
    indices: Sequence[int],
    results: Sequence[ClipFrames | Fault],
    measures: Sequence[Measure],
    faults: list[Fault],
) -> dict[str, np.ndarray] | None:
    """The features of a batch; None if it has faults, which are added to the others."""
    loaded = [result for result in results if not isinstance(result, Fault)]
    faults += [result for result in results if isinstance(result, Fault)]
    if len(loaded) < len(results):
        return None
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
    """The stored features of a set of clips, in the order of the clips: one file per batch."""

    paths: Sequence[Path]

    def batches(self, name: str) -> Iterator[np.ndarray]:
        """Yields an array (b, ...) for each batch; a UserError if its file is missing or damaged."""
        for path in self.paths:
            with user_errors(f"cannot read the features '{path}' ({{reason}}); delete it and evaluate again"):
                with np.load(path, allow_pickle=False) as arrays:
                    yield arrays[name]

    def all(self, name: str) -> np.ndarray:
        """The array of all clips, (n, ...)."""
        return np.concatenate(list(self.batches(name)))

    @property
    def names(self) -> list[str]:
        with np.load(self.paths[0]) as arrays:
            return list(arrays.files)
