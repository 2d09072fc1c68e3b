"""Several data sets trained together: videos of several sources, videos and pictures."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from microcinema.data.ordering import ShuffledOrder, Stream
from microcinema.utils.errors import UserError


class JointDataset(Dataset[dict[str, Any]]):
    """The clips of all parts one after the other; training mixes them by their weights, each batch from one part.

    Joint image-video training (arXiv 2204.03458, section 3.2) is a part with `num_frames=1`: picture files, or single frames of the same videos.

    Args:
        parts: data sets by name.
        weights: how many times each part is gone through in one pass over all of them, by the same names; it may be a fraction.
        bucket_run: numbers in a row from one part: a multiple of the batch size.

    Raises:
        UserError: no parts, other names in `weights`, a weight that is not positive.
    """

    def __init__(self, parts: Mapping[str, Any], weights: Mapping[str, float], bucket_run: int = 64) -> None:
        if not parts or set(parts) != set(weights) or min(weights.values()) <= 0:
            given = ", ".join(f"{name}: {weight:g}" for name, weight in weights.items()) or "none"
            raise UserError(
                f"weights {given} for the parts {', '.join(parts) or 'none'}; give each a positive number of passes"
            )
        self.parts, self.weights, self.bucket_run = dict(parts), dict(weights), bucket_run
        self.starts: dict[str, int] = {}
        length = 0
        for name, part in self.parts.items():
            self.starts[name] = length
            length += len(part)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._part(index)
        return {**self.parts[name][index - self.starts[name]], "index": index}

    def id(self, index: int) -> str:
        """Part and name of an item."""
        name = self._part(index)
        return f"{name}/{self.parts[name].id(index - self.starts[name])}"

    def fingerprint(self) -> dict[str, Any]:
        """Those of all parts."""
        return {
            f"{name}.{key}": value for name, part in self.parts.items() for key, value in part.fingerprint().items()
        }

    def set_epoch(self, epoch: int) -> None:
        """Tells all parts."""
        for part in self.parts.values():
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def streams(self, seed: int) -> list[tuple[Stream, int]]:
        """The orders of all parts, with the numbers of a pass that each gets."""
        streams: list[tuple[Stream, int]] = []
        for number, (name, part) in enumerate(self.parts.items()):
            inner = part.streams(seed + number) if hasattr(part, "streams") else []
            for stream, share in inner or [(ShuffledOrder(len(part), [seed, number]), len(part))]:
                weighted = max(1, round(share * self.weights[name]))
                streams.append((_Shifted(stream, self.starts[name]), weighted))
        return streams

    def _part(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return [name for name, start in self.starts.items() if start <= index][-1]


class _Shifted:
    """A stream whose items are counted from another number on."""

    def __init__(self, stream: Stream, start: int) -> None:
        self.stream, self.start, self.length = stream, start, stream.length

    def locate(self, number: int) -> tuple[int, int]:
        epoch, item = self.stream.locate(number)
        return epoch, self.start + item

    def substitute(self, number: int, attempt: int) -> int:
        return self.start + self.stream.substitute(number, attempt)
