import pytest

from microcinema.data.indexed import DistributedBatchSampler, IndexedDataset
from microcinema.data.source import ClipSource
from microcinema.utils.errors import UserError


class Named(ClipSource):
    """Items that tell by which epoch and index they were read."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return {"index": index, "epoch": self.epoch}


def read(clips: IndexedDataset, numbers) -> list[tuple[int, int]]:
    items = [clips[number] for number in numbers]
    assert [item["sample_index"] for item in items] == list(numbers)
    return [(item["epoch"], item["index"]) for item in items]


def test_every_epoch_holds_every_clip_once_in_another_order():
    items = read(IndexedDataset(Named(20), seed=1), range(60))
    epochs = [[index for epoch, index in items if epoch == k] for k in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert read(IndexedDataset(Named(20), seed=2), range(20)) != items[:20]


def test_a_clip_is_known_by_its_number_alone():
    forwards = read(IndexedDataset(Named(7), seed=1), range(30))
    backwards = read(IndexedDataset(Named(7), seed=1), range(29, -1, -1))
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("batch_size, processes", [(4, 1), (2, 2), (1, 4)])
def test_processes_share_the_same_clips_step_by_step(batch_size, processes):
    ranks = [list(DistributedBatchSampler(8, 24, batch_size, rank, processes)) for rank in range(processes)]
    assert all(len(rank) == len(DistributedBatchSampler(8, 24, batch_size, 0, processes)) == 4 for rank in ranks)
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert sorted(number for batch in batches for number in batch) == list(range(8 + 4 * step, 12 + 4 * step))


def test_the_fingerprint_tells_lists_and_orders_apart():
    class Listed(Named):
        """With names, which shift from one place on."""

        def __init__(self, length: int, shifted_from: int) -> None:
            super().__init__(length)
            self.shifted_from = shifted_from

        def id(self, index: int) -> str:
            return f"clip {index + (index >= self.shifted_from)}"

    plain = IndexedDataset(Named(1000), seed=0).fingerprint()
    assert IndexedDataset(Named(1000), seed=0).fingerprint() == plain
    named = [IndexedDataset(Listed(1000, place), seed=0).fingerprint() for place in (0, 500, 1000)]
    others = [IndexedDataset(Named(1001), seed=0).fingerprint(), IndexedDataset(Named(1000), seed=1).fingerprint()]
    assert len({plain, *named, *others}) == 6


def test_bad_input():
    with pytest.raises(UserError, match="0 clips"):
        IndexedDataset(Named(0), seed=0)
    with pytest.raises(ValueError, match="not a multiple of 4"):
        DistributedBatchSampler(0, 10, 4)
