"""The Fréchet video distance (arXiv 1812.01717), or another one of two sets, with what it takes to be believed: how it depends on the number of clips, how wide it
scatters, and what two sets of real clips score."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from microcinema.evaluation.frechet import Moments, frechet_distance
from microcinema.utils.errors import UserError

SUBSETS = 15
RESAMPLES = 100
CONFIDENCE = 0.95


@dataclass(frozen=True)
class VideoDistance:
    """`value` at `num_generated` and `num_real` clips.

    `curve`: (n, distance of n generated to n real clips), n ascending. `extrapolated`: where a line in 1/n through the curve meets an
    infinite number of clips (Chong and Forsyth, arXiv 1911.07023); None with too few clips for a line. `low`, `high`: 95 % bootstrap
    interval, laid round the value: resampling repeats clips, which shifts the distance itself upward. `floor`: distance of two halves of
    the real clips, of `floor_count` each; None with fewer than two in one. `resamples`: the bootstrapped distances; two models with as many clips
    have the same clips in each, so that their difference has an interval.
    """

    value: float
    num_generated: int
    num_real: int
    low: float
    high: float
    extrapolated: float | None
    curve: list[tuple[int, float]]
    floor: float | None
    floor_count: int
    resamples: list[float]


def video_distance(
    generated: np.ndarray,
    real: np.ndarray,
    of_moments: Callable[[Moments, Moments], float] = frechet_distance,
    seed: int = 0,
) -> VideoDistance:
    """Of features (n, d) and (m, d); `seed` is that of subsets and resamples. A UserError for fewer than two clips in a set, features of
    different widths, or that are no numbers."""
    for name, features in (("generated", generated), ("real", real)):
        if not np.isfinite(features).all():
            raise UserError(f"features of {name} clips are no numbers; see that the detector's weights are whole")

    def distance(a: np.ndarray, b: np.ndarray, *counts: np.ndarray | None) -> float:
        one, two = map(Moments.of, (a, b), counts or (None, None))
        return of_moments(one, two)

    value = distance(generated, real)
    curve = _curve(generated, real, distance, np.random.default_rng([seed, 0]))
    resamples = _resamples(generated, real, distance, np.random.default_rng([seed, 1]))
    order, half = np.random.default_rng([seed, 2]).permutation(len(real)), len(real) // 2
    floor = distance(real[order[:half]], real[order[half : 2 * half]]) if half > 1 else None
    counts = len(generated), len(real)
    low, middle, high = np.quantile(resamples, [(1 - CONFIDENCE) / 2, 0.5, (1 + CONFIDENCE) / 2]).tolist()
    spread = value + low - middle, value + high - middle
    return VideoDistance(value, *counts, *spread, extrapolate(curve), curve, floor, half, resamples)


def extrapolate(curve: list[tuple[int, float]]) -> float | None:
    """The value at infinite n of the least-squares line in 1/n; None with fewer than three points."""
    if len(curve) < 3:
        return None
    counts, values = np.array(curve, np.float64).T
    return float(np.polyfit(1 / counts, values, 1)[1])


def _curve(generated, real, distance, rng) -> list[tuple[int, float]]:
    largest = min(len(generated), len(real))
    sizes = np.unique(np.linspace(max(2, largest / 5), largest, SUBSETS).round().astype(int))
    picks = [[rng.choice(len(features), n, replace=False) for features in (generated, real)] for n in sizes]
    return [(int(n), distance(generated[one], real[two])) for n, (one, two) in zip(sizes, picks, strict=True)]


def _resamples(generated, real, distance, rng) -> list[float]:
    values = []
    for _ in range(RESAMPLES):  # counts of the clips in place of copies
        sizes = len(generated), len(real)
        values.append(distance(generated, real, *(np.bincount(rng.integers(n, size=n), minlength=n) for n in sizes)))
    return values
