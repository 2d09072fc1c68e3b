"""Parity with the suite's own code, where it is on the path: a clone of https://github.com/Vchitect/VBench, easydict and torchvision."""

import pytest

from benchmarks import vbench

for name in ("vbench", "vbench2_beta_i2v", "easydict", "torchvision"):
    pytest.importorskip(name, reason=f"{name} is not installed; it is no dependency", exc_type=Exception)


@pytest.mark.slow
def test_scores_are_those_of_the_suite(tmp_path):
    found = vbench.compare(tmp_path)
    assert len(found) == 6
    for name, (mine, yours) in found.items():
        assert 0 < yours < 1 and abs(mine - yours) < 1e-3 * (1 - yours), name


@pytest.mark.slow
def test_flow_and_decision_are_those_of_the_suite(tmp_path):
    found = vbench.compare_raft(tmp_path)
    assert found["flow"] < 1e-4 and found["alike"] == 1 and 0 < found["moving"] < 1
