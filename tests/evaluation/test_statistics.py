import numpy as np
import pytest

from microcinema.evaluation.statistics import mean, proportion


def test_proportions_have_wilson_intervals():
    result = proportion([1] * 8 + [0] * 2)
    # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = 0.8, n = 10, z = 1.95996
    assert (result["value"], result["n"]) == (0.8, 10)
    assert (result["low"], result["high"]) == (pytest.approx(0.49016, abs=1e-4), pytest.approx(0.94332, abs=1e-4))
    assert proportion([1] * 5)["high"] == 1


def test_means_have_bootstrap_intervals():
    values = np.random.default_rng(0).normal(3, 2, 400)
    result = mean(values)
    half = 1.96 * values.std() / 20
    assert result["low"] == pytest.approx(result["value"] - half, abs=0.1 * half + 0.01)
    assert result["high"] == pytest.approx(result["value"] + half, abs=0.1 * half + 0.01)
    assert mean([2.0]) == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 1}
