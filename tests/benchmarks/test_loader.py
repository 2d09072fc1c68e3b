"""The benchmark of the loader, short: memory does not grow."""

from benchmarks import loader


def test_memory_of_a_loader_does_not_grow(tmp_path):
    """A worker and its decoder's process; the long run is `python -m benchmarks.loader`."""
    found = loader.read_clips(600, 300, "pyav", 60.0, 1, (48, 64), tmp_path)
    assert found["before"] > 30e6
    assert found["growth"] < 0.05
