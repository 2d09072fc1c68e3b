"""Clips of several shapes: each clip in the bucket that suits it best, each batch from one bucket."""

from collections.abc import Sequence

import numpy as np

from microcinema.config.instantiate import convert
from microcinema.config.types import Shapes
from microcinema.data.ordering import Ordering, ShuffledOrder

_TICK = 1e-6  # seconds, as in data/video_reader.py


class Buckets:
    """Buckets with shapes (num_frames, height, width), and the index of the bucket of each clip, `assignment` (n,)."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], assignment: np.ndarray) -> None:
        self.shapes = convert("buckets", shapes, Shapes)
        self.assignment = assignment.astype(np.int16)

    def shape(self, index: int) -> tuple[int, int, int]:
        """(num_frames, height, width) of a clip."""
        return self.shapes[int(self.assignment[index])]

    def orderings(self, key: Sequence[int]) -> list[tuple[Ordering, int]]:
        """An order for each bucket that has clips, and their number."""
        members = [np.flatnonzero(self.assignment == bucket) for bucket in range(len(self.shapes))]
        return [
            (ShuffledOrder(len(items), [*key, bucket], items), len(items))
            for bucket, items in enumerate(members)
            if len(items)
        ]

    @staticmethod
    def assign(
        shapes: Sequence[tuple[int, int, int]],
        fps: float | None,
        height: np.ndarray,
        width: np.ndarray,
        num_frames: np.ndarray,
        duration: np.ndarray,
    ) -> np.ndarray:
        """For each video the bucket of the nearest aspect ratio; among several, that of most frames for which the video is long enough; -1: none."""
        best = np.full(len(height), -1)
        best_distance, best_frames = np.full(len(height), np.inf), np.zeros(len(height))
        with np.errstate(invalid="ignore", divide="ignore"):
            log_aspect = np.log(width / height)
            for bucket, (frames, bucket_height, bucket_width) in enumerate(convert("buckets", shapes, Shapes)):
                if fps is None or frames == 1:  # a picture has no duration
                    long_enough = num_frames >= frames
                else:
                    long_enough = duration >= (frames - 1) / fps + _TICK
                distance = np.abs(log_aspect - np.log(bucket_width / bucket_height))
                as_near = (distance < best_distance + 1e-9) & (frames > best_frames)
                better = long_enough & ((distance < best_distance - 1e-9) | as_near)
                best[better], best_distance[better], best_frames[better] = bucket, distance[better], frames
        return best
