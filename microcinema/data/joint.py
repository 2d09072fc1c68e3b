"""Several data sets trained together: videos of several sources, videos and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from microcinema.config.types import Count, Positive
from microcinema.data.ordering import Ordering
from microcinema.data.source import ClipSource
from microcinema.utils.errors import UserError


class JointDataset(ClipSource):
    """The clips of several data sets one after the other; training mixes them by their weights, each batch from one data set.

    Joint image-video training (arXiv 2204.03458, section 3.2) includes a data set with `num_frames=1`: picture files, or single frames of the
    same videos.

    Args:
        parts: data sets by name.
        weights: epochs over each of them in one epoch over all, by the same names; fractions are allowed.
        bucket_run: consecutive samples from one data set, a multiple of the batch size.

    Raises:
        UserError: no data sets, names in `weights` that differ, a weight that is not positive.
    """

    def __init__(
        self, parts: Mapping[str, ClipSource], weights: Mapping[str, Positive], bucket_run: Count = 64
    ) -> None:
        if not parts or set(parts) != set(weights) or min(weights.values()) <= 0:
            values = ", ".join(f"{name}: {weight:g}" for name, weight in weights.items()) or "none"
            names = ", ".join(parts) or "none"
            raise UserError(f"weights {values} for the parts {names}; give each a positive number of epochs")
        self.parts, self.weights, self.same_shape_run = dict(parts), dict(weights), bucket_run
        self.starts: dict[str, int] = {}
        self._length = 0
        for name, part in self.parts.items():
            self.starts[name] = self._length
            self._length += len(part)
        self.skipped = {
            f"{reason} ({name})": count for name, part in self.parts.items() for reason, count in part.skipped.items()
        }

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, part, inner_index = self._locate(index)
        return {**part[inner_index], "index": index}

    def id(self, index: int) -> str:
        name, part, inner_index = self._locate(index)
        return f"{name}/{part.id(inner_index)}"

    def set_epoch(self, epoch: int) -> None:
        for part in self.parts.values():
            part.set_epoch(epoch)

    def check_processes(self, count: int) -> None:
        for name, part in self.parts.items():
            try:
                part.check_processes(count)
            except UserError as error:
                raise UserError(f"data.parts.{name}: {error}") from None

    def orderings(self, key: Sequence[int]) -> list[tuple[Ordering, int]]:
        return [
            (_OffsetOrder(ordering, self.starts[name]), max(1, round(share * self.weights[name])))
            for number, (name, part) in enumerate(self.parts.items())
            for ordering, share in part.orderings([*key, number])
        ]

    def fingerprint(self) -> dict[str, Any]:
        return {
            f"{name}.{key}": value for name, part in self.parts.items() for key, value in part.fingerprint().items()
        }

    def _locate(self, index: int) -> tuple[str, ClipSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = [name for name, start in self.starts.items() if start <= index][-1]
        return name, self.parts[name], index - self.starts[name]


class _OffsetOrder:
    """An ordering of items whose indices begin at `offset`."""

    def __init__(self, ordering: Ordering, offset: int) -> None:
        self.ordering, self.offset, self.length = ordering, offset, ordering.length

    def epoch_and_index(self, sample_index: int) -> tuple[int, int]:
        epoch, index = self.ordering.epoch_and_index(sample_index)
        return epoch, self.offset + index

    def replacement(self, sample_index: int, attempt: int) -> int:
        return self.offset + self.ordering.replacement(sample_index, attempt)
