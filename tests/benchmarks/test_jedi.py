"""Parity with a public implementation, where it is installed: `pip install --no-deps videojedi vjepa && pip install scikit-learn`."""

import pytest

from benchmarks import jedi

for name in ("videojedi", "vjepa", "sklearn"):
    pytest.importorskip(name, reason=f"{name} is not installed; it is no dependency", exc_type=ImportError)


@pytest.mark.slow
def test_the_same_weights_and_videos_give_the_same_number():
    found = jedi.compare(3)
    assert found["here"] > 0
    assert found["features"] < 1e-5 and found["distance"] < 1e-9 and found["end_to_end"] < 1e-4
