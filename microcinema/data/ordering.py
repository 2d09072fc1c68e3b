"""Global orders of training samples: pure functions from (seed, sample index) to the epoch and the item of a data set.

Training consumes sample indices 0, 1, 2, ... without end (data/indexed.py). An `Ordering` maps each index to an item directly, so the
samples depend neither on the batch size, nor on the number of processes, nor on what was read before.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Ordering(Protocol):
    """An endless order of the items of a data set."""

    length: int  # samples in one epoch

    def epoch_and_index(self, sample_index: int) -> tuple[int, int]:
        """The epoch, and the index of the item in the data set."""
        ...

    def replacement(self, sample_index: int, attempt: int) -> int:
        """The index of an item of the same shape that replaces a broken one; `attempt` counts from 1, in case the replacement is broken too."""
        ...


class ShuffledOrder:
    """Every item once in each epoch, in a new permutation seeded by `key`; `items` are indices, by default 0 .. length - 1."""

    def __init__(self, length: int, key: Sequence[int], items: np.ndarray | None = None) -> None:
        self.length, self.key, self.items = length, list(key), items
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def epoch_and_index(self, sample_index: int) -> tuple[int, int]:
        epoch, position = divmod(sample_index, self.length)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([*self.key, epoch]).permutation(self.length)
            self._epoch = epoch
        return epoch, self._item(int(self._permutation[position]))

    def replacement(self, sample_index: int, attempt: int) -> int:
        return self._item(int(np.random.default_rng([*self.key, sample_index, attempt]).integers(self.length)))

    def _item(self, position: int) -> int:
        return position if self.items is None else int(self.items[position])


class ShardOrder:
    """Every sample of every shard once in each epoch, few shards at a time, so that disk or network are read sequentially.

    Each epoch concatenates the shards in a new order, with the samples shuffled within each shard, and cuts the result into
    `parallel_shards` lanes of equal length, which are read side by side: sample n is the next one of lane n % parallel_shards. If
    `parallel_shards` is a multiple of the global batch size times the loader's workers, each worker of each process reads its own lanes and
    so its own shards; otherwise the order is the same, and several workers open some shards.

    Args:
        counts: samples of each shard; items are numbered through the shards.
        key: seeds of the permutations.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, parallel_shards: int, key: Sequence[int]) -> None:
        self.counts, self.parallel_shards, self.key = np.asarray(counts, dtype=np.int64), parallel_shards, list(key)
        self.length = int(self.counts.sum())
        self.starts = np.cumsum(self.counts) - self.counts
        self._epoch = -1
        self._shards = self._ends = np.empty(0, dtype=np.int64)
        self._permutations: dict[int, np.ndarray] = {}  # of the samples within a shard

    def epoch_and_index(self, sample_index: int) -> tuple[int, int]:
        epoch, position = divmod(sample_index, self.length)
        if epoch != self._epoch:
            self._shards = np.random.default_rng([*self.key, epoch]).permutation(len(self.counts))
            self._ends = np.cumsum(self.counts[self._shards])
            self._permutations.clear()
            self._epoch = epoch
        step, lane = divmod(position, self.parallel_shards)
        lane_length, remainder = divmod(self.length, self.parallel_shards)
        row = lane * lane_length + min(lane, remainder) + step  # the first `remainder` lanes are one sample longer
        slot = int(np.searchsorted(self._ends, row, side="right"))
        shard = int(self._shards[slot])
        if shard not in self._permutations:
            if len(self._permutations) > 2 * self.parallel_shards:
                self._permutations.clear()
            rng = np.random.default_rng([*self.key, epoch, shard])
            self._permutations[shard] = rng.permutation(int(self.counts[shard]))
        sample = self._permutations[shard][row - int(self._ends[slot] - self.counts[shard])]
        return epoch, int(self.starts[shard] + sample)

    def replacement(self, sample_index: int, attempt: int) -> int:
        # From the same shard, which is open already.
        shard = int(np.searchsorted(self.starts, self.epoch_and_index(sample_index)[1], side="right")) - 1
        sample = np.random.default_rng([*self.key, sample_index, attempt]).integers(self.counts[shard])
        return int(self.starts[shard] + sample)


class MixedOrder:
    """A mixture of orderings in runs of `same_shape_run` consecutive samples from one of them, so that batches which divide a run have one shape.

    In each epoch, ordering k contributes `shares[k]` samples on average, in whole runs: after E epochs it has contributed
    floor(E shares[k] / same_shape_run) runs. No ordering is ever rounded away, and all items of an ordering are met equally often. The runs
    of an epoch are shuffled.
    """

    def __init__(self, orderings: Sequence[Ordering], shares: Sequence[int], same_shape_run: int, seed: int) -> None:
        self.orderings, self.shares = list(orderings), list(shares)
        self.same_shape_run, self.seed = same_shape_run, seed
        self.length = sum(self.shares)
        self._epoch = -1
        self._runs = np.empty((0, 2), dtype=np.int64)  # of an epoch: ordering, number of the run within the ordering

    def epoch_and_index(self, sample_index: int) -> tuple[int, int]:
        ordering, inner_index = self._inner(sample_index)
        return ordering.epoch_and_index(inner_index)

    def replacement(self, sample_index: int, attempt: int) -> int:
        ordering, inner_index = self._inner(sample_index)
        return ordering.replacement(inner_index, attempt)

    def _inner(self, sample_index: int) -> tuple[Ordering, int]:
        """The ordering of a sample, and its sample index there."""
        run, offset = divmod(sample_index, self.same_shape_run)
        epoch = run * self.same_shape_run // self.length
        while sum(self._runs_before(epoch + 1)) <= run:
            epoch += 1
        first = self._runs_before(epoch)
        if epoch != self._epoch:
            last = self._runs_before(epoch + 1)
            runs = [(k, number) for k in range(len(first)) for number in range(first[k], last[k])]
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(runs))
            self._runs = np.array(runs, dtype=np.int64).reshape(-1, 2)[shuffled]
            self._epoch = epoch
        k, number = self._runs[run - sum(first)].tolist()
        return self.orderings[k], number * self.same_shape_run + offset

    def _runs_before(self, epoch: int) -> list[int]:
        """Runs that each ordering has contributed before an epoch."""
        return [epoch * share // self.same_shape_run for share in self.shares]
