"""Training samples by their index in one global order, whatever the batch size or the number of processes.

An optimizer step consumes the next `global batch` of sample indices, so the index of the next sample is all the state that a run has of its
data, and everything random about a sample is drawn from (seed, sample index). data/ordering.py maps indices to items.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from microcinema.data.ordering import MixedOrder, Ordering
from microcinema.data.quarantine import Quarantine
from microcinema.data.source import ClipSource
from microcinema.utils.errors import UserError
from microcinema.utils.hashing import hash_chunks

_FINGERPRINT_SAMPLES = 256


class IndexedDataset(Dataset):
    """A data set indexed by sample index; items gain `sample_index`, and `broken`: the number of broken clips that this one replaces.

    The epoch is set right before an item is read, in the worker process that reads it. Without a quarantine, errors of broken clips are
    raised. An empty data set is a UserError.
    """

    def __init__(self, dataset: ClipSource, seed: int, quarantine: Quarantine | None = None) -> None:
        if len(dataset) == 0:
            raise UserError("the data set holds 0 clips; check its list and its root folder")
        self.dataset = dataset
        self.quarantine = quarantine
        orderings, shares = zip(*dataset.orderings([seed]), strict=True)
        if len(orderings) == 1:
            self.order: Ordering = orderings[0]
            self.same_shape_run = 1  # all items have one shape
        else:
            self.same_shape_run = dataset.same_shape_run
            self.order = MixedOrder(orderings, shares, self.same_shape_run, seed)

    def __getitem__(self, sample_index: int) -> dict[str, Any]:
        epoch, index = self.order.epoch_and_index(sample_index)
        self.dataset.set_epoch(epoch)
        if self.quarantine is None:
            return {**self.dataset[index], "sample_index": sample_index, "broken": 0}
        item, broken = self.quarantine.read(
            self.dataset, sample_index, index, lambda attempt: self.order.replacement(sample_index, attempt)
        )
        return {**item, "sample_index": sample_index, "broken": broken}

    def fingerprint(self) -> str:
        """sha256 of the number of clips and of the names of 256 of them, spread over the first epoch in this order."""
        samples = np.linspace(0, self.order.length - 1, _FINGERPRINT_SAMPLES).astype(int).tolist()
        indices = [self.order.epoch_and_index(sample_index)[1] for sample_index in samples]
        lines = (f"{index} {self.dataset.id(index)}\n" for index in indices)
        return hash_chunks([f"{len(self.dataset)} {self.order.length}\n", *lines])


class DistributedBatchSampler(Sampler[list[int]]):
    """Micro-batches of one process: sample indices from `start` up to `stop`, `batch_size` to each process in turn.

    Raises:
        ValueError: the range does not divide by the global micro-batch.
        UserError: micro-batches would hold clips of two shapes.
    """

    def __init__(
        self, start: int, stop: int, batch_size: int, rank: int = 0, num_processes: int = 1, same_shape_run: int = 1
    ) -> None:
        if same_shape_run > 1 and (same_shape_run % batch_size or start % batch_size):
            clips = f"the {same_shape_run} consecutive clips of one shape, or the {start} clips trained so far"
            advice = "choose another train_batch_size, or data.bucket_run"
            raise UserError(f"train_batch_size={batch_size} does not divide {clips}; {advice}")
        self.global_batch_size = batch_size * num_processes
        if (stop - start) % self.global_batch_size:
            raise ValueError(f"clips {start}..{stop} are not a multiple of {self.global_batch_size}")
        self.start, self.stop, self.batch_size, self.rank = start, stop, batch_size, rank

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.start + self.rank * self.batch_size, self.stop, self.global_batch_size):
            yield list(range(first, first + self.batch_size))

    def __len__(self) -> int:
        return max(0, self.stop - self.start) // self.global_batch_size
