"""What stands beside the Fréchet distance, on normal distributions whose distance is known."""

from functools import partial

import numpy as np
import pytest

from microcinema.evaluation.frechet import Moments, frechet_distance
from microcinema.evaluation.fvd import RESAMPLES, SUBSETS, extrapolate, video_distance
from microcinema.utils.errors import UserError

WIDTH = 24
SHIFT = 0.5  # in every dimension, so that the true squared distance is 6


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    return rng.normal(size=(600, WIDTH)) + SHIFT, rng.normal(size=(700, WIDTH))


@pytest.fixture(scope="module")
def found(sets):
    return video_distance(*sets)


def test_extrapolation_takes_the_bias_away(found):
    truth = WIDTH * SHIFT**2
    assert (found.num_generated, found.num_real) == (600, 700)
    sizes, values = zip(*found.curve, strict=True)
    assert len(sizes) == SUBSETS and sizes[0] == 120 and sizes[-1] == 600
    assert values[0] > values[-1] > truth  # biased upward, the more the fewer clips
    assert abs(found.extrapolated - truth) < 0.5 * abs(found.value - truth)


def test_the_line_is_in_one_over_n():
    assert extrapolate([(n, 7 + 30 / n) for n in (10, 20, 40)]) == pytest.approx(7)
    assert extrapolate([(2, 1.0), (3, 1.0)]) is None


def test_the_interval_is_as_wide_as_repeated_measurements_scatter(found):
    rng = np.random.default_rng(1)
    again = [
        video_distance_value(rng.normal(size=(600, WIDTH)) + SHIFT, rng.normal(size=(700, WIDTH))) for _ in range(60)
    ]
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(np.ptp(np.quantile(again, [0.025, 0.975])), rel=0.5)


@pytest.mark.parametrize("width", [6, 60])  # fewer and more features than clips
def test_the_interval_is_that_of_resampled_clips(width):
    """By the definition: the same draws, as copies of the features."""
    rng = np.random.default_rng(3)
    generated, real = rng.normal(size=(40, width)) + SHIFT, rng.normal(size=(50, width))
    rng, values = np.random.default_rng([0, 1]), []
    for _ in range(RESAMPLES):
        one, two = (rng.integers(n, size=n) for n in (40, 50))
        values.append(video_distance_value(generated[one], real[two]))
    low, middle, high = np.quantile(values, [0.025, 0.5, 0.975])
    found = video_distance(generated, real)
    assert found.low - found.value == pytest.approx(low - middle, rel=1e-7)
    assert found.high - found.value == pytest.approx(high - middle, rel=1e-7)


def video_distance_value(generated, real):
    return frechet_distance(Moments.of(generated), Moments.of(real))


def test_the_floor_is_that_of_two_real_halves(sets, found):
    assert found.floor_count == 350
    same = video_distance(sets[1][:350], sets[1][350:])
    assert 0 < found.floor < 0.2 * found.value
    assert found.floor == pytest.approx(same.value, rel=0.3)


def test_the_same_clips_give_the_same_numbers(sets, found):
    assert video_distance(*sets) == found
    assert (
        video_distance(*sets, seed=1).value
        == found.value
        != video_distance(*sets, partial(frechet_distance, ddof=0)).value
    )


def test_few_clips_and_none():
    rng = np.random.default_rng(2)
    few = video_distance(rng.normal(size=(2, 4)), rng.normal(size=(3, 4)))
    assert few.extrapolated is None and few.floor is None and few.value > 0
    with pytest.raises(UserError, match="at least two"):
        video_distance(rng.normal(size=(1, 4)), rng.normal(size=(3, 4)))
    with pytest.raises(UserError, match="generated clips are no numbers"):
        video_distance(np.full((3, 4), np.nan), rng.normal(size=(3, 4)))
