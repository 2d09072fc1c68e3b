import tracemalloc

import numpy as np
import pytest

from microcinema.evaluation.detectors import Batch
from microcinema.evaluation.features import Clips, UnreadableClips, extract_features
from microcinema.utils.errors import UserError

BATCH = 3


def clip(index: int) -> tuple[np.ndarray, None]:
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


def run(folder, count=8, measure=None, share=(0, 1), load=clip, batch_size=BATCH, numbers=None, **identity):
    numbers = range(count) if numbers is None else numbers
    prompts, names = [f"prompt {number}" for number in numbers], [f"clip {number}" for number in numbers]
    clips = Clips(names, lambda index: load(numbers[index]), prompts, numbers=numbers)
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
    next(tmp_path.glob("000003-*.npz")).unlink()
    measure = Mean()
    run(tmp_path, measure=measure)
    assert measure.seen == [[3, 4, 5]]
    with pytest.raises(UserError, match="seed was null and is 1"):
        run(tmp_path, seed=1)


def test_a_clip_that_is_left_out_changes_no_batch_but_its_own(tmp_path):
    run(tmp_path)
    measure = Mean()
    features = run(tmp_path, measure=measure, numbers=[0, 1, 2, 3, 5, 6, 7])
    assert measure.seen == [[3, 5]]
    assert features.all("mean").tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert run(tmp_path).all("mean").tolist() == list(range(8))  # and the whole set is still there


def test_all_clips_that_cannot_be_read_are_told_at_once_when_the_others_are_measured(tmp_path):
    def broken(number):
        if number in (1, 7):
            raise UserError(f"clip {number} is damaged")
        return clip(number)

    measure = Mean()
    with pytest.raises(
        UnreadableClips, match="2 of 8 clips cannot be read: clip 1 is damaged; clip 7 is damaged$"
    ) as error:
        run(tmp_path, measure=measure, load=broken)
    assert [fault.clip for fault in error.value.faults] == [1, 7] and measure.seen == [[3, 4, 5]]
    with pytest.raises(UnreadableClips, match="and 3 more$"):
        run(tmp_path / "b", load=lambda number: broken(1))
    again = Mean()
    run(tmp_path, measure=again)
    assert again.seen == [[0, 1, 2], [6, 7]]


def test_a_lost_file_is_named(tmp_path):
    features = run(tmp_path)
    next(tmp_path.glob("000003-*.npz")).unlink()
    with pytest.raises(UserError, match="000003-"):
        features.all("mean")


def test_memory_does_not_grow_with_the_number_of_clips(tmp_path):
    tracemalloc.start()
    run(tmp_path, 80, load=lambda index: (np.zeros((16, 64, 64, 3), np.uint8), None), batch_size=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one = 16 * 64 * 64 * 3
    # The batch that is measured, its stack, and the one that is read ahead are six clips of the eighty.
    assert peak < 8 * one, peak / one
