import tracemalloc

import numpy as np
import pytest

from microcinema.evaluation.detectors import Batch
from microcinema.evaluation.features import Clips, Features, extract_features
from microcinema.utils.errors import UserError

BATCH = 3


def clip(index: int) -> tuple[np.ndarray, None]:
    if index == 999:
        raise UserError("clip 999 is damaged")
    return np.full((4, 8, 8, 3), index, np.uint8), None


class Mean:
    """Measures means, and remembers its batches and their prompts."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.prompts: list[str] = []

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        self.seen.append(batch.frames[:, 0, 0, 0, 0].tolist())
        self.prompts += batch.prompts or []
        return {"mean": batch.frames.mean(axis=(1, 2, 3, 4), dtype=np.float32)}


def run(folder, count=8, measure=None, share=(0, 1), load=clip, batch_size=BATCH, **identity):
    clips = Clips(count, load, [f"prompt {index}" for index in range(count)])
    return extract_features(clips, [measure or Mean()], folder, identity, batch_size, "", *share, progress=False)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_any_number_of_processes_stores_the_same_in_the_same_batches(tmp_path, processes):
    seen, prompts = [], []
    for rank in reversed(range(processes)):
        measure = Mean()
        features = run(tmp_path, measure=measure, share=(rank, processes))
        seen, prompts = seen + measure.seen, prompts + measure.prompts
    assert sorted(seen) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert sorted(prompts) == [f"prompt {index}" for index in range(8)]
    assert features.names == ["mean"]
    np.testing.assert_array_equal(features.all("mean"), np.arange(8, dtype=np.float32))


def test_what_is_stored_is_not_measured_again(tmp_path):
    run(tmp_path)
    (tmp_path / "000003.npz").unlink()
    measure = Mean()
    run(tmp_path, measure=measure)
    assert measure.seen == [[3, 4, 5]]
    with pytest.raises(UserError, match="seed was null and is 1"):
        run(tmp_path, seed=1)


def test_a_clip_that_cannot_be_read_is_told_and_a_lost_file_named(tmp_path):
    with pytest.raises(UserError, match="clip 999"):
        run(tmp_path, load=lambda index: clip(999 if index == 4 else index))
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == ["000000.npz"]
    with pytest.raises(UserError, match="000003.npz"):
        Features(tmp_path, 8, BATCH).all("mean")


def test_memory_does_not_grow_with_the_number_of_clips(tmp_path):
    peaks = []
    for count in (8, 80):
        tracemalloc.start()
        run(tmp_path / str(count), count, load=lambda index: (np.zeros((16, 64, 64, 3), np.uint8), None), batch_size=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one = 16 * 64 * 64 * 3
    assert peaks[1] < peaks[0] + one and peaks[0] > 4 * one, peaks
