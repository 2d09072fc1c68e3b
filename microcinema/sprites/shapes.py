"""The shapes of Moving Sprites: signed distances in units of the object's radius, negative inside."""

from collections.abc import Callable

import numpy as np

from microcinema.sprites.portable_math import cos, sin


def _polygon_distance(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Exact signed distance to a simple polygon with the given `corners` (n, 2)."""
    nearest = np.full(x.shape, np.inf, x.dtype)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        crosses = (ay > y) != (by > y)
        if ey != 0:
            inside ^= crosses & (x < ax + ex * (y - ay) / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _regular_corners(radii: tuple[float, ...], points: int) -> np.ndarray:
    """`points * len(radii)` corners around the centre, the first at the top, their radii cycling through `radii`."""
    count = points * len(radii)
    angle = 2 * np.pi * np.arange(count) / count - np.pi / 2
    radius = np.resize(np.asarray(radii), count)
    return np.stack([radius * cos(angle), radius * sin(angle)], axis=1).astype(np.float32)


_TRIANGLE = _regular_corners((1.0,), 3) + np.asarray([0.0, 0.12], np.float32)
_SQUARE = np.asarray([[-0.7, -0.7], [0.7, -0.7], [0.7, 0.7], [-0.7, 0.7]], np.float32)
_STAR = _regular_corners((1.0, 0.46), 5)


def _heart_corners() -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    sine = sin(angle)
    x = 16 * (sine * sine * sine)
    y = -(13 * cos(angle) - 5 * cos(2 * angle) - 2 * cos(3 * angle) - cos(4 * angle))
    return np.stack([x / 16.5, (y - 2.0) / 16.5], axis=1).astype(np.float32)


_HEART = _heart_corners()


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x.astype(np.float64) ** 2 + y.astype(np.float64) ** 2).astype(x.dtype)


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = x - 0.16  # puts the crescent's middle near the centre of rotation
    return np.maximum(_distance(x, y) - 0.98, 0.80 - _distance(x - 0.52, y + 0.12))


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: _distance(x, y) - 0.86,
    "square": lambda x, y: _polygon_distance(x, y, _SQUARE) - 0.06,
    "triangle": lambda x, y: _polygon_distance(x, y, _TRIANGLE) - 0.05,
    "star": lambda x, y: _polygon_distance(x, y, _STAR) - 0.05,
    "heart": lambda x, y: _polygon_distance(x, y, _HEART),
    "moon": _moon,
}
