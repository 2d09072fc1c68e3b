"""Proportions and means over clips, and means over runs, with their 95 % intervals."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, bootstrap, t

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


def over_runs(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean over runs, such as seeds, with its interval by Student's t, since they are few: value, low, high, n; None where too few values say."""
    n = len(values)
    value = float(np.mean(values)) if n else None
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None
    low, high = (None, None) if value is None or half is None else (value - half, value + half)
    return {"value": value, "low": low, "high": high, "n": n}
