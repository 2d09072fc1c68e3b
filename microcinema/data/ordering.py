"""Which clip has which number: the global order of a run, computed for any number at once.

Training numbers its clips 0, 1, 2, ... for ever (training/order.py). A `Stream` says for each number which item of a data set it is, and in the
how-manieth pass; nothing but the seed and the number decides, neither batch size, nor the number of processes, nor what was read before.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from microcinema.utils.errors import UserError


class Stream(Protocol):
    """An endless order of the items of a data set.

    Attributes:
        length: clips in one pass.
    """

    length: int

    def locate(self, number: int) -> tuple[int, int]:
        """The pass (epoch) and the item that a number stands for."""
        ...

    def substitute(self, number: int, attempt: int) -> int:
        """The item of the same shape that takes the place of a broken one; `attempt` counts from 1, should that one be broken as well."""
        ...


class ShuffledOrder:
    """Every item once in each pass, each pass in another order.

    Args:
        length: number of items.
        key: what the order depends on: the seed, and what tells this stream from others of the same run.
        items: the items; None for 0 .. length - 1.
    """

    def __init__(self, length: int, key: Sequence[int], items: np.ndarray | None = None) -> None:
        self.length, self.key, self.items = length, list(key), items
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def locate(self, number: int) -> tuple[int, int]:
        epoch, position = divmod(number, self.length)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([*self.key, epoch]).permutation(self.length)
            self._epoch = epoch
        return epoch, self._item(int(self._permutation[position]))

    def substitute(self, number: int, attempt: int) -> int:
        return self._item(int(np.random.default_rng([*self.key, number, attempt]).integers(self.length)))

    def _item(self, position: int) -> int:
        return position if self.items is None else int(self.items[position])


class ShardOrder:
    """Every sample of every shard once in each pass, few shards at a time: an order that can be read from disk or network at full speed.

    In each pass the shards are laid end to end in a new order, samples shuffled within each; that row is cut into `lanes` equal parts, which are
    read side by side: number n is the next sample of lane n % lanes. Where `lanes` is a multiple of the global batch times the
    loader's workers, each worker of each process has lanes, and so shards, of its own; elsewhere the order is the same, and some shards are
    opened by more than one worker.

    Args:
        counts: samples of each shard; items are numbered through the shards in their order.
        lanes: shards read side by side.
        key: what the order depends on.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, lanes: int, key: Sequence[int]) -> None:
        self.counts, self.lanes, self.key = np.asarray(counts, dtype=np.int64), lanes, list(key)
        self.length = int(self.counts.sum())
        self.starts = np.cumsum(self.counts) - self.counts
        self._epoch = -1
        self._shards = self._ends = np.empty(0, dtype=np.int64)
        self._within: dict[int, np.ndarray] = {}

    def locate(self, number: int) -> tuple[int, int]:
        epoch, position = divmod(number, self.length)
        if epoch != self._epoch:
            self._shards = np.random.default_rng([*self.key, epoch]).permutation(len(self.counts))
            self._ends = np.cumsum(self.counts[self._shards])
            self._within.clear()
            self._epoch = epoch
        lane, place = position % self.lanes, position // self.lanes
        share, rest = divmod(self.length, self.lanes)
        row = lane * share + min(lane, rest) + place  # the first `rest` lanes are one longer
        which = int(np.searchsorted(self._ends, row, side="right"))
        shard = int(self._shards[which])
        if shard not in self._within:
            if len(self._within) > 2 * self.lanes:
                self._within.clear()
            self._within[shard] = np.random.default_rng([*self.key, epoch, shard]).permutation(int(self.counts[shard]))
        within = self._within[shard][row - int(self._ends[which] - self.counts[shard])]
        return epoch, int(self.starts[shard] + within)

    def substitute(self, number: int, attempt: int) -> int:
        shard = int(np.searchsorted(self.starts, self.locate(number)[1], side="right")) - 1  # one that is at hand
        chosen = np.random.default_rng([*self.key, number, attempt]).integers(self.counts[shard])
        return int(self.starts[shard] + chosen)


class Joint:
    """Several streams in one, `group` numbers in a row from the same: so a batch that divides `group` has one shape.

    Of each pass, stream k gets `shares[k]` numbers on average, in whole groups: after E passes it has had floor(E shares[k] / group) of them, so
    none is ever rounded away, and a stream of which a share is its length meets each of its items equally often. Groups of a
    pass come in a shuffled order.

    Args:
        streams: each with items of one shape.
        shares: numbers for each stream in a pass.
        group: numbers in a row.
        seed: of the order.

    Raises:
        UserError: no share, or none greater than 0.
    """

    def __init__(self, streams: Sequence[Stream], shares: Sequence[int], group: int, seed: int) -> None:
        if group < 1 or len(streams) != len(shares) or min(shares, default=0) < 1:
            raise UserError(
                f"streams of clips with shares {list(shares)}, in groups of {group}; give a positive number of each"
            )
        self.streams, self.shares, self.group, self.seed = list(streams), list(shares), group, seed
        self.length = sum(self.shares)
        self._epoch = -1
        self._groups = np.empty(0, dtype=np.int64)

    def locate(self, number: int) -> tuple[int, int]:
        stream, inner = self._stream(number)
        return self.streams[stream].locate(inner)

    def substitute(self, number: int, attempt: int) -> int:
        stream, inner = self._stream(number)
        return self.streams[stream].substitute(inner, attempt)

    def _stream(self, number: int) -> tuple[int, int]:
        """The stream of a number, and the number within it."""
        group, offset = divmod(number, self.group)
        epoch = group * self.group // self.length
        while sum(self._before(epoch + 1)) <= group:
            epoch += 1
        before = self._before(epoch)
        if epoch != self._epoch:
            counts = [after - have for after, have in zip(self._before(epoch + 1), before, strict=True)]
            # Each group as stream and number of the group within the stream.
            groups = [(stream, have + k) for stream, have in enumerate(before) for k in range(counts[stream])]
            order = np.random.default_rng([self.seed, epoch]).permutation(len(groups))
            self._groups = np.array(groups, dtype=np.int64).reshape(-1, 2)[order]
            self._epoch = epoch
        stream, inner = self._groups[group - sum(before)].tolist()
        return stream, inner * self.group + offset

    def _before(self, epoch: int) -> list[int]:
        """Groups that each stream has had when a pass begins."""
        return [epoch * share // self.group for share in self.shares]
