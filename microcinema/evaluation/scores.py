"""Numbers from features of whole sets, beside the Fréchet distance: kernel distance and Inception score."""

import numpy as np
from scipy.stats import entropy

from microcinema.utils.errors import UserError

_BLOCK = 1024  # rows of a Gram matrix in memory at once


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared maximum mean discrepancy, unbiased, of features (n, d) and (m, d) under the kernel `(x.y / d + 1)^3`.

    Kernel video distance of arXiv 1812.01717, with the kernel of Bińkowski et al. (arXiv 1801.01401, equation 3): no bias at any number of
    clips, and so below zero at times. A UserError for fewer than two clips in a set.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"kernel distance of {len(a)} and {len(b)} clips; measure at least two of each")
    return _mean_kernel(a, a, True) + _mean_kernel(b, b, True) - 2 * _mean_kernel(a, b, False)


def _mean_kernel(a: np.ndarray, b: np.ndarray, same: bool) -> float:
    """Mean of the kernel over all pairs; if both are the same set, over pairs of two."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    blocks = (a[start : start + _BLOCK] for start in range(0, len(a), _BLOCK))
    total = sum(float(((block @ b.T / a.shape[1] + 1) ** 3).sum()) for block in blocks)
    if not same:
        return total / (len(a) * len(b))
    itself = float((((a * a).sum(axis=1) / a.shape[1] + 1) ** 3).sum())
    return (total - itself) / (len(a) * (len(a) - 1))


def inception_score(probabilities: np.ndarray, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over splits of `exp(E KL(p(y|x) || p(y)))` (Salimans et al., arXiv 1606.03498), from (n, classes).

    Clips are shuffled before they are split: in the order of their prompts each split would hold a few classes only. A UserError for fewer
    clips than splits.
    """
    if len(probabilities) < splits:
        raise UserError(f"Inception score of {len(probabilities)} clips in {splits} splits; measure at least {splits}")
    shuffled = np.asarray(probabilities, np.float64)[np.random.default_rng(seed).permutation(len(probabilities))]
    scores = []
    for part in np.array_split(shuffled, splits):
        scores.append(np.exp(entropy(part, part.mean(axis=0, keepdims=True), axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
