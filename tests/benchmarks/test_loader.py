"""The benchmark of the loader, short: memory does not grow."""

import runpy
from pathlib import Path

benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "loader.py"))


def test_memory_of_a_loader_does_not_grow(tmp_path):
    """A worker and its decoder's process; the long run is `python -m benchmarks.loader`."""
    found = benchmark["measure"](600, 300, "pyav", 60.0, 1, (48, 64), tmp_path)
    assert found["before"] > 30e6
    assert found["growth"] < 0.05
