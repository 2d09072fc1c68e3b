"""The order in which training meets clips: one global numbering, whatever the batch size or the number of processes.

Clip number n is item n % len of epoch n // len, after that epoch's seeded permutation. An optimiser step consumes the next `global batch` of
numbers, so a run is told completely by the number of its next clip, and all that is random about a clip is drawn from (seed, n).
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset, Sampler

from microcinema.errors import UserError


class Clips(Protocol):
    """What training asks of a data set; `set_epoch(n)` is called too where there is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class NumberedClips(Dataset):
    """A data set indexed by the number of a clip in the global order; items gain `number`.

    The epoch is told to the data set right before the item is read, in whichever worker process reads it: a call to `set_epoch` in the
    main process would not reach workers that are already running.

    Raises:
        UserError: the data set is empty.
    """

    def __init__(self, dataset: Clips, seed: int) -> None:
        if len(dataset) == 0:
            raise UserError("the data set holds 0 clips; check its list and its root folder")
        self.dataset = dataset
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, position = divmod(number, len(self.dataset))
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self._epoch = epoch
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        return {**self.dataset[int(self._permutation[position])], "number": number}


class RankNumbers(Sampler[list[int]]):
    """The clip numbers of one process, a micro-batch at a time: numbers `start` up to `stop`, dealt out `batch_size` to each process in turn.

    Raises:
        ValueError: the range is no whole number of rounds.
    """

    def __init__(self, start: int, stop: int, batch_size: int, rank: int = 0, num_processes: int = 1) -> None:
        self.round = batch_size * num_processes
        if (stop - start) % self.round:
            raise ValueError(f"clips {start}..{stop} are not a multiple of {self.round}")
        self.start, self.stop, self.batch_size, self.rank = start, stop, batch_size, rank

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.start + self.rank * self.batch_size, self.stop, self.round):
            yield list(range(first, first + self.batch_size))

    def __len__(self) -> int:
        return max(0, self.stop - self.start) // self.round
