import warnings

import numpy as np
import pytest
import scipy.linalg

from microcinema.evaluation.frechet import Moments, frechet_distance, jedi_distance
from microcinema.utils.errors import UserError


def normal(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    return Moments(2, np.asarray(mean, float), np.asarray(covariance, float))  # count 2: the covariance is the scatter


def random_covariance(rng: np.random.Generator, width: int) -> np.ndarray:
    root = rng.normal(size=(width, 2 * width))
    return root @ root.T / width


def test_one_dimension_closed_form():
    # Two normal distributions: (m1 - m2)^2 + (s1 - s2)^2.
    a, b = normal([1.0], [[4.0]]), normal([-2.0], [[25.0]])
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 5) ** 2)


def test_covariances_that_commute_closed_form():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    one, two = rng.uniform(0, 3, 6), rng.uniform(0, 3, 6)
    a, b = normal(np.zeros(6), basis @ np.diag(one) @ basis.T), normal(np.ones(6), basis @ np.diag(two) @ basis.T)
    assert frechet_distance(a, b) == pytest.approx(6 + ((np.sqrt(one) - np.sqrt(two)) ** 2).sum())


def test_agrees_with_the_matrix_square_root_where_that_is_sound():
    rng = np.random.default_rng(1)
    one, two = random_covariance(rng, 12), random_covariance(rng, 12)
    expected = np.trace(one + two) - 2 * np.trace(scipy.linalg.sqrtm(one @ two)).real
    assert frechet_distance(normal(np.zeros(12), one), normal(np.zeros(12), two)) == pytest.approx(expected, rel=1e-9)


def test_zero_to_itself_and_symmetric_with_fewer_clips_than_features():
    rng = np.random.default_rng(2)
    a, b = Moments.of(rng.normal(size=(20, 128))), Moments.of(rng.normal(size=(30, 128)) + 0.3)
    assert abs(frechet_distance(a, a)) < 1e-9
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 0


def test_moments_of_parts_merge_into_those_of_the_whole():
    features = np.random.default_rng(3).normal(loc=1e3, size=(50, 7))
    whole = Moments.of(features)
    merged = Moments.of(features[:1]).merge(Moments.of(features[1:20])).merge(Moments.of(features[20:]))
    assert merged.count == 50
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(merged.covariance(), np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ddof", [0, 1])
def test_both_divisors(ddof):
    rng = np.random.default_rng(4)
    one, two = rng.normal(size=(9, 3)), 2 * rng.normal(size=(7, 3)) + 1
    a, b = (np.cov(x, rowvar=False, ddof=ddof) for x in (one, two))
    shift = one.mean(axis=0) - two.mean(axis=0)
    expected = shift @ shift + np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real
    assert frechet_distance(Moments.of(one), Moments.of(two), ddof) == pytest.approx(expected, rel=1e-9)


def test_right_with_fewer_clips_than_features_where_the_matrix_square_root_is_not():
    """60 clips, 400 features, all of it in 10 dimensions, where the distance can be had without a singular matrix."""
    rng = np.random.default_rng(5)
    basis, _ = np.linalg.qr(rng.normal(size=(400, 10)))
    one, two = rng.normal(size=(60, 10)), 1.5 * rng.normal(size=(60, 10)) + 0.2
    a, b = (np.cov(x, rowvar=False) for x in (one, two))
    shift = one.mean(axis=0) - two.mean(axis=0)
    expected = shift @ shift + np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real
    wide = [Moments.of(x @ basis.T) for x in (one, two)]
    assert frechet_distance(*wide) == pytest.approx(expected, rel=1e-9)
    product = wide[0].covariance() @ wide[1].covariance()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rooted = np.trace(scipy.linalg.sqrtm(product)).real
    naive = shift @ shift + np.trace(wide[0].covariance() + wide[1].covariance()) - 2 * rooted
    # Eigenvalues that are rounding enter it by their roots; older versions of scipy give no number at all.
    assert not abs(naive - expected) < 1e-8 * expected


def test_counts_stand_for_copies():
    features, taken = np.random.default_rng(7).normal(loc=10, size=(30, 5)), np.array([0, 0, 0, 2, 7, 7, 29])
    found, expected = Moments.of(features, np.bincount(taken, minlength=30)), Moments.of(features[taken])
    assert found.count == expected.count == 7
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(found.scatter, expected.scatter, rtol=1e-11, atol=1e-12)


def test_sets_without_any_spread():
    still, moving = np.ones((4, 3)), np.random.default_rng(8).normal(size=(9, 3))
    assert frechet_distance(Moments.of(still), Moments.of(still + 2)) == pytest.approx(12)
    mean, spread = moving.mean(axis=0) - 1, np.cov(moving, rowvar=False).trace()
    assert frechet_distance(Moments.of(still), Moments.of(moving)) == pytest.approx(mean @ mean + spread)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_parts_of_several_processes_merge_to_the_same_bits(processes):
    """Batches dealt out, made in whatever order, sorted by their number, and merged one by one."""
    features = np.random.default_rng(6).normal(size=(70, 12)).astype(np.float32)
    batches = dict(enumerate(np.split(features, range(8, 70, 8))))
    dealt = [key for rank in range(processes) for key in list(batches)[rank::processes]]
    found = Moments.stream(batches[key] for key in sorted(dealt))
    whole = Moments.stream(batches.values())
    assert found.mean.tobytes() == whole.mean.tobytes() and found.scatter.tobytes() == whole.scatter.tobytes()
    np.testing.assert_allclose(found.covariance(), np.cov(features.astype(float), rowvar=False), rtol=1e-9, atol=1e-12)


def test_bad_input():
    one = Moments.of(np.zeros((1, 3)))
    with pytest.raises(UserError, match="at least two"):
        frechet_distance(one, one)
    with pytest.raises(UserError, match="3 and 4"):
        frechet_distance(Moments.of(np.zeros((2, 3))), Moments.of(np.zeros((2, 4))))
    with pytest.raises(UserError, match="at least one"):
        Moments.of(np.zeros((0, 3)))


def test_jedi_is_the_mean_of_the_kernel_over_all_pairs():
    """By the definition; parity with videojedi from the same weights: benchmarks.jedi."""
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(9, 5)) + 0.3, rng.normal(size=(7, 5))
    within = sum(np.mean([(x @ y / 5) ** 2 for x in side for y in side]) for side in (a, b))
    between = np.mean([(x @ y / 5) ** 2 for x in a for y in b])
    assert jedi_distance(Moments.of(a), Moments.of(b)) == pytest.approx(100 * (within - 2 * between), rel=1e-12)
    batches = Moments.stream([a[:4], a[4:]])
    assert jedi_distance(batches, Moments.of(b)) == pytest.approx(100 * (within - 2 * between), rel=1e-12)
