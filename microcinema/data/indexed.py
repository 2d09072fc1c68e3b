"""The order in which training meets clips: one global numbering, whatever the batch size or the number of processes.

Which item clip number n is, data/numbering.py says: as a rule item n % len of epoch n // len, after that epoch's seeded permutation. An optimiser
step consumes the next `global batch` of numbers, so a run is told completely by the number of its next clip, and all that is random
about a clip is drawn from (seed, n).
"""

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset, Sampler

from microcinema.data.ordering import Joint, ShuffledOrder, Stream
from microcinema.data.quarantine import Quarantine
from microcinema.utils.errors import UserError

_LOOKED_AT = 256


class Clips(Protocol):
    """What training asks of a data set. Where there are such, it also calls `set_epoch(n)`, and `streams(seed)` for orders of its own."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class IndexedDataset(Dataset):
    """A data set indexed by the number of a clip in the global order; items gain `number`, and `broken`: how many clips it stands in for.

    The epoch is told to the data set right before the item is read, in whichever worker process reads it: a call to `set_epoch` in the
    main process would not reach workers that are already running.

    Args:
        quarantine: what becomes of a clip that cannot be read; None: its error.

    Raises:
        UserError: the data set is empty.
    """

    def __init__(self, dataset: Clips, seed: int, quarantine: Quarantine | None = None) -> None:
        if len(dataset) == 0:
            raise UserError("the data set holds 0 clips; check its list and its root folder")
        self.dataset = dataset
        self.quarantine = quarantine
        streams = dataset.streams(seed) if hasattr(dataset, "streams") else []
        self.order: Stream = ShuffledOrder(len(dataset), [seed])
        self.group = 1  # numbers in a row whose items have one shape; 1: all have
        if len(streams) == 1:
            self.order = streams[0][0]
        elif streams:
            self.group = dataset.bucket_run  # type: ignore[attr-defined]
            orders, shares = zip(*streams, strict=True)
            self.order = Joint(orders, shares, self.group, seed)

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, index = self.order.locate(number)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if self.quarantine is None:
            return {**self.dataset[index], "number": number, "broken": 0}
        item, broken = self.quarantine.read(
            self.dataset, number, index, lambda attempt: self.order.substitute(number, attempt)
        )
        return {**item, "number": number, "broken": broken}

    def fingerprint(self) -> str:
        """sha256 of how many clips there are, and of the names of some, spread over the first pass in this order.

        Another list, seed or way to order it gives another one, as a rule; ten million clips take no longer than a few hundred.
        """
        digest = hashlib.sha256(f"{len(self.dataset)} {self.order.length}\n".encode())
        for number in np.linspace(0, self.order.length - 1, _LOOKED_AT).astype(int).tolist():
            _, index = self.order.locate(number)
            name = self.dataset.id(index) if hasattr(self.dataset, "id") else ""
            digest.update(f"{index} {name}\n".encode())
        return digest.hexdigest()


class DistributedBatchSampler(Sampler[list[int]]):
    """The clip numbers of one process, a micro-batch at a time: numbers `start` up to `stop`, dealt out `batch_size` to each process in turn.

    Args:
        group: numbers in a row whose items have one shape; 1: all have.

    Raises:
        ValueError: the range is no whole number of rounds.
        UserError: micro-batches would hold clips of two shapes.
    """

    def __init__(
        self, start: int, stop: int, batch_size: int, rank: int = 0, num_processes: int = 1, group: int = 1
    ) -> None:
        if group > 1 and (group % batch_size or start % batch_size):
            raise UserError(
                f"train_batch_size={batch_size} does not divide the {group} clips in a row that share a shape, "
                f"or the {start} clips trained so far; choose another train_batch_size, or data.bucket_run"
            )
        self.round = batch_size * num_processes
        if (stop - start) % self.round:
            raise ValueError(f"clips {start}..{stop} are not a multiple of {self.round}")
        self.start, self.stop, self.batch_size, self.rank = start, stop, batch_size, rank

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.start + self.rank * self.batch_size, self.stop, self.round):
            yield list(range(first, first + self.batch_size))

    def __len__(self) -> int:
        return max(0, self.stop - self.start) // self.round
