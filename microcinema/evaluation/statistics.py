"""Proportions and means over clips with their 95 % intervals."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, bootstrap

CONFIDENCE = 0.95
RESAMPLES = 2000


def proportion(outcomes: Sequence[float]) -> dict[str, float | int]:
    """Proportion of ones with its Wilson interval: value, low, high, n."""
    successes, count = int(sum(outcomes)), len(outcomes)
    interval = binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return {"value": successes / count, "low": float(interval.low), "high": float(interval.high), "n": count}


def mean(values: Sequence[float]) -> dict[str, float | int]:
    """Mean with its bootstrap interval (percentiles of `RESAMPLES` resamples, fixed seed): value, low, high, n."""
    data = np.asarray(values, np.float64)
    low = high = float(data.mean())
    if len(data) > 1 and np.ptp(data) > 0:
        interval = bootstrap(
            (data,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=max(1, 10**7 // len(data)),  # resamples in memory at once; the result does not depend on it
            confidence_level=CONFIDENCE,
            method="percentile",
            random_state=0,
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"value": float(data.mean()), "low": low, "high": high, "n": len(data)}
