import itertools

import numpy as np
import pytest

from microcinema.evaluation import scores
from microcinema.evaluation.scores import inception_score, kernel_distance
from microcinema.utils.errors import UserError


def test_kernel_distance_is_its_definition(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(4, 3)) + 1

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    within = [np.mean([kernel(x, y) for x, y in itertools.permutations(z, 2)]) for z in (a, b)]
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between)
    monkeypatch.setattr(scores, "_BLOCK", 2)
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between)
    with pytest.raises(UserError, match="at least two"):
        kernel_distance(a[:1], b)


def test_kernel_distance_has_no_bias():
    rng = np.random.default_rng(1)
    values = [kernel_distance(rng.normal(size=(12, 6)), rng.normal(size=(9, 6))) for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    assert min(values) < 0


def test_inception_score_closed_forms():
    certain = np.tile(np.eye(10), (20, 1))  # each class as often, each clip sure
    assert inception_score(certain, splits=1)[0] == pytest.approx(10)
    assert inception_score(np.full((50, 7), 1 / 7)) == (pytest.approx(1), pytest.approx(0))
    with pytest.raises(UserError, match="4 clips in 10 splits"):
        inception_score(certain[:4])


def test_clips_in_the_order_of_their_classes_are_shuffled_first():
    ordered = np.repeat(np.eye(10), 50, axis=0)
    assert inception_score(ordered)[0] > 8  # split as they stand, each split would have one class, and score 1
    assert inception_score(ordered) == inception_score(ordered)
