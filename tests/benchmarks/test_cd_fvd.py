"""Parity with a public implementation, where it is installed: `pip install --no-deps cd-fvd requests`."""

import itertools
import runpy
from pathlib import Path

import pytest

pytest.importorskip("cdfvd", reason="cd-fvd is not installed; it is no dependency")
pytest.importorskip("requests")
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "cd_fvd.py"))


@pytest.mark.slow
def test_the_same_weights_and_videos_give_the_same_distance():
    found = SCRIPT["compare"](3, 10)
    assert found["features"] < 1e-4
    assert max(found["statistics"].values()) < 1e-4
    assert set(found["end_to_end"]) == {"squash", "cd_fvd"} and max(found["end_to_end"].values()) < 1e-4
    values = sorted(found["fvd"].values())
    assert len(values) == 4 and all(later > 1.001 * before for before, later in itertools.pairwise(values))


@pytest.mark.slow
def test_extraction_is_at_least_as_fast():
    found = SCRIPT["throughput"](16, 1, 3)
    assert found["microcinema"] >= found["cd-fvd"]
