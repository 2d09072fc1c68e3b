"""Parity with a public implementation, where it is installed: `pip install --no-deps cd-fvd requests`."""

import itertools

import pytest

from benchmarks import cd_fvd

pytest.importorskip("cdfvd", reason="cd-fvd is not installed; it is no dependency")
pytest.importorskip("requests")


@pytest.mark.slow
def test_the_same_weights_and_videos_give_the_same_distance():
    found = cd_fvd.compare(3, 10)
    assert found["features"] < 1e-4
    assert max(found["statistics"].values()) < 1e-4
    assert set(found["end_to_end"]) == {"squash", "cd_fvd"} and max(found["end_to_end"].values()) < 1e-4
    values = sorted(found["fvd"].values())
    assert len(values) == 4 and all(later > 1.001 * before for before, later in itertools.pairwise(values))


@pytest.mark.slow
def test_videomae_has_the_same_features():
    assert cd_fvd.compare_videomae() < 1e-5


@pytest.mark.slow
def test_extraction_is_at_least_as_fast():
    found = cd_fvd.throughput(16, 1, 3)
    assert found["microcinema"] >= found["cd-fvd"]
