"""Clips of several shapes: each in the bucket that suits it, each batch from one bucket."""

from collections.abc import Sequence

import numpy as np

from microcinema.data.ordering import Ordering, ShuffledOrder
from microcinema.utils.errors import UserError

_TICK = 1e-6  # seconds, as in data/video_reader.py


class Buckets:
    """The bucket of every clip of a data set.

    Args:
        shapes: (num_frames, height, width) of each bucket.
        choice: the number of its bucket for each clip.
        bucket_run: numbers in a row from one bucket.

    Raises:
        UserError: shapes that are none.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], choice: np.ndarray, bucket_run: int) -> None:
        self.shapes = _checked(shapes)
        self.choice = choice.astype(np.int16)
        self.bucket_run = bucket_run

    def shape(self, index: int) -> tuple[int, int, int]:
        """(num_frames, height, width) of a clip."""
        return self.shapes[int(self.choice[index])]

    def orderings(self, key: Sequence[int]) -> list[tuple[Ordering, int]]:
        """An order for each bucket that has clips, and how many it has."""
        members = [np.flatnonzero(self.choice == number) for number in range(len(self.shapes))]
        return [
            (ShuffledOrder(len(items), [*key, number], items), len(items))
            for number, items in enumerate(members)
            if len(items)
        ]

    @staticmethod
    def choose(
        shapes: Sequence[tuple[int, int, int]],
        fps: float | None,
        height: np.ndarray,
        width: np.ndarray,
        num_frames: np.ndarray,
        duration: np.ndarray,
    ) -> np.ndarray:
        """For each video the bucket of the nearest aspect ratio, and among those the one of most frames for which it is long enough; -1: none."""
        shapes = _checked(shapes)
        best = np.full(len(height), -1)
        distance, frames = np.full(len(height), np.inf), np.zeros(len(height))
        with np.errstate(invalid="ignore", divide="ignore"):
            aspect = np.log(width / height)
            for number, (count, tall, wide) in enumerate(shapes):
                if fps is None or count == 1:  # a picture has no duration
                    long_enough = num_frames >= count
                else:
                    long_enough = duration >= (count - 1) / fps + _TICK
                away = np.abs(aspect - np.log(wide / tall))
                nearer = (away < distance - 1e-9) | ((away < distance + 1e-9) & (count > frames))
                better = long_enough & nearer
                best[better], distance[better], frames[better] = number, away[better], count
        return best


def _checked(shapes: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    for shape in shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise UserError(f"bucket {list(shape)}; give [num_frames, height, width]")
    if not shapes:
        raise UserError("buckets is empty; give at least one [num_frames, height, width], or null")
    return [(int(count), int(tall), int(wide)) for count, tall, wide in shapes]
