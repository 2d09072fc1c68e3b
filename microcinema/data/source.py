"""What training, and the commands that prepare data, may ask of any data set of clips."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from microcinema.data.ordering import Ordering, ShuffledOrder
from microcinema.data.video_reader import Source, TarMember
from microcinema.utils.errors import UserError


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices below `length`, evenly spaced from the first to the last."""
    return np.linspace(0, length - 1, min(length, count)).astype(int).tolist()


class ClipSource(Dataset[dict[str, Any]]):
    """Base class of the data sets; a subclass defines `__len__`, `__getitem__` and whatever else it knows better.

    An item holds `video` float32 (f, 3, H, W) in [-1, 1] or scaled `latents` (f, c, h, w), `caption`, `fps`, and, where the data set has them,
    `description` and `motion` (captions of the key frame and of the motion), `id`, `index`, `flow` and `flow_valid`.

    Attributes:
        epoch: pass over the data, on which random clip positions depend.
        same_shape_run: consecutive samples of the global order whose items have one shape, where `orderings` gives several orders.
        skipped: clips that the data set leaves out, by reason.
        empty_tokens: encoder outputs of the empty caption that came with the items, by the name of the encoder's output.
        motion_scores: of all items in all epochs, NaN where broken, (n,), if they are known without decoding (data/motion_score.py).
    """

    epoch: int = 0
    same_shape_run: int = 1
    skipped: Mapping[str, int] = {}
    empty_tokens: Mapping[str, torch.Tensor] = {}
    motion_scores: np.ndarray | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Selects the pass over the data to which the next items belong; a loader's worker process has to call it itself."""
        self.epoch = epoch

    def orderings(self, key: Sequence[int]) -> list[tuple[Ordering, int]]:
        """Orders whose items have one shape each, with their samples per epoch; `key` seeds the permutations."""
        return [(ShuffledOrder(len(self), key), len(self))]

    def check_processes(self, count: int) -> None:
        """Raises a UserError if some of `count` processes would have nothing to read."""

    def id(self, index: int) -> str:
        """Name of a clip in messages, quarantine and manifest."""
        return str(index)

    def key(self, index: int) -> str:
        """What tells the file of a clip from all others of the data set, where clips of one video share an `id`."""
        return self.id(index)

    def file_state(self, index: int) -> str:
        """Size and time of a clip's file: what changes if it is replaced; empty if it is missing."""
        try:
            source = self.file(index)
        except UserError:
            return ""
        stat = os.stat(source.archive if isinstance(source, TarMember) else source)
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def file(self, index: int) -> Source:
        """The video or picture of a clip; a UserError if it has none, or it is missing."""
        raise UserError(f"clips of a {type(self).__name__} have no files")

    def captions(self, index: int) -> dict[str, str]:
        """`caption`, `description` and `motion` of a clip; a UserError if it has no caption."""
        raise UserError(f"captions of a {type(self).__name__} cannot be read without its items")

    def subset(self, indices: Sequence[int] | np.ndarray) -> tuple["ClipSource", Sequence[int] | np.ndarray]:
        """A data set with these clips, small enough to be sent to another process, and their indices in it; a UserError if there is none."""
        raise UserError(f"data of kind {type(self).__name__} cannot be checked; check the data that it is made of")

    def fingerprint(self) -> dict[str, Any]:
        """What decides the contents of the items, as JSON values: cached latents are refused when it changes."""
        raise NotImplementedError(f"{type(self).__name__} has no fingerprint, which cached latents need")


class ClipWrapper(ClipSource):
    """A data set that changes or replaces the items of another and shares everything else with it; subclasses define `__getitem__`."""

    def __init__(self, dataset: ClipSource) -> None:
        self.dataset = dataset
        self.same_shape_run = dataset.same_shape_run
        self.skipped = dataset.skipped
        self.empty_tokens = dataset.empty_tokens

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def orderings(self, key: Sequence[int]) -> list[tuple[Ordering, int]]:
        return self.dataset.orderings(key)

    def check_processes(self, count: int) -> None:
        self.dataset.check_processes(count)

    def id(self, index: int) -> str:
        return self.dataset.id(index)

    def fingerprint(self) -> dict[str, Any]:
        return self.dataset.fingerprint()
