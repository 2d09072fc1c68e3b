"""Distances between two sets of features by their moments, in float64: Fréchet's, and JEDi's.

Fréchet's is `|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2)` (Dowson and Landau 1982; Heusel et al., arXiv 1706.08500, equation 6; on video
features Unterthiner et al., arXiv 1812.01717).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy.linalg.lapack import dpstrf

from microcinema.utils.errors import UserError


@dataclass(frozen=True)
class Moments:
    """Mean (d,) of a set of features, and the sum of the outer products of their deviations from it, `scatter` (d, d)."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, counts: np.ndarray | None = None) -> "Moments":
        """Of features (n, d), n >= 1, each taken so many times, (n,); by default once."""
        if features.ndim != 2 or len(features) < 1:
            raise UserError(f"features have shape {features.shape}; give at least one row of (n, d)")
        counts = np.ones(len(features), int) if counts is None else counts
        taken = np.flatnonzero(counts)
        deviations, weights, total = features[taken].astype(np.float64), counts[taken].astype(np.float64), counts.sum()
        mean = weights @ deviations / total
        deviations -= mean
        deviations *= np.sqrt(weights)[:, None]
        return cls(int(total), mean, deviations.T @ deviations)

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan, Golub, LeVeque 1979, equation 2.1)."""
        count, shift = self.count + other.count, other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    @classmethod
    def stream(cls, batches: Iterable[np.ndarray]) -> "Moments":
        """Of batches of features, one in memory at a time. The same batches in the same order give the same bits, whoever made them."""
        return reduce(cls.merge, map(cls.of, batches))

    def covariance(self, ddof: int = 1) -> np.ndarray:
        """Divided by n - ddof, (d, d): 1 is unbiased, 0 is what some implementations of the Fréchet video distance take. A UserError for
        fewer than two clips."""
        if self.count < 2:
            raise UserError(f"covariance of {self.count} clip; measure at least two")
        return self.scatter / (self.count - ddof)


def frechet_distance(a: Moments, b: Moments, ddof: int = 1) -> float:
    """Squared Fréchet distance of the two normal distributions with these moments.

    With `S = R R^T`, `tr (S_a S_b)^1/2` is the sum of the singular values of `R_a^T R_b`: unlike a general matrix square root,
    stable and never negative on singular covariances (fewer clips than features). A UserError for fewer than two clips, or features of
    different widths.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features are {len(a.mean)} and {len(b.mean)} wide; use one detector for both sets")
    one, two = a.covariance(ddof), b.covariance(ddof)
    overlap = np.linalg.svd(_root(one).T @ _root(two), compute_uv=False).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(one) + np.trace(two) - 2 * overlap)


def jedi_distance(a: Moments, b: Moments) -> float:
    """JEDi (arXiv 2410.05203): 100 times the squared maximum mean discrepancy under the kernel `(x.y / d)^2`, pairs of a clip with itself counted.

    Since `(x.y)^2 = <x x^T, y y^T>`, it is the squared distance of the two second moments `E x x^T`, divided by d^2.
    """
    one, two = (side.scatter / side.count + np.outer(side.mean, side.mean) for side in (a, b))
    return float(100 * np.square((one - two) / len(one)).sum())


def _root(covariance: np.ndarray) -> np.ndarray:
    """R (d, rank) with R R^T = covariance, by Cholesky's decomposition with pivots, which ends where only rounding is left."""
    factor, pivots, rank, _ = dpstrf(covariance, lower=True)
    root = np.zeros((len(factor), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    return root
