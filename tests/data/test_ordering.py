"""The global order: pure in (seed, number), every clip as often as it should be, one shape a group, few shards at a time."""

from collections import Counter

import numpy as np
import pytest

from microcinema.data.buckets import Buckets
from microcinema.data.ordering import MixedOrder, ShardOrder, ShuffledOrder
from microcinema.utils.errors import UserError

COUNTS = [7, 3, 0, 11, 5, 1]


def joint(seed: int = 0) -> MixedOrder:
    orders = [ShuffledOrder(30, [seed, 0], np.arange(30)), ShuffledOrder(10, [seed, 1], np.arange(100, 110))]
    return MixedOrder([*orders, ShuffledOrder(1, [seed, 2], np.array([200]))], [30, 10, 1], same_shape_run=4, seed=seed)


ORDERS = {
    "shuffled": lambda seed=0: ShuffledOrder(20, [seed]),
    "shards": lambda seed=0: ShardOrder(COUNTS, 4, [seed]),
    "joint": joint,
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_number_alone_decides(name):
    forwards = [ORDERS[name]().epoch_and_index(number) for number in range(150)]
    order = ORDERS[name]()
    backwards = [order.epoch_and_index(number) for number in reversed(range(150))][::-1]
    assert forwards == backwards
    assert forwards != [ORDERS[name](seed=1).epoch_and_index(number) for number in range(150)]
    replacements = [order.replacement(number, attempt) for number in range(50) for attempt in (1, 2)]
    again = ORDERS[name]()
    assert replacements == [again.replacement(number, attempt) for number in range(50) for attempt in (1, 2)]
    assert replacements[::2] != replacements[1::2]


@pytest.mark.parametrize("name, size", [("shuffled", 20), ("shards", sum(COUNTS))])
def test_a_pass_holds_every_item_once(name, size):
    order = ORDERS[name]()
    items = [order.epoch_and_index(number) for number in range(3 * size)]
    for epoch in range(3):
        assert sorted(item for found, item in items if found == epoch) == list(range(size))
    assert items[:size] != [(0, item) for _, item in items[size : 2 * size]]


def test_a_joint_order_is_fair_and_of_one_order_a_group():
    """Over many passes each item is met equally often, also that of the order which is smaller than a group."""
    order, passes = joint(), 12
    items = [order.epoch_and_index(number)[1] for number in range(passes * order.length // 4 * 4)]
    groups = np.array(items).reshape(-1, 4) // 100
    assert (groups == groups[:, :1]).all()
    times = Counter(items)
    assert set(times) == {*range(30), *range(100, 110), 200}
    assert all(abs(count - passes) <= 4 for count in times.values())
    assert list(groups[:8, 0]) != sorted(groups[:8, 0])  # mixed, not one order after the other


def test_a_share_decides_how_often_a_order_is_met():
    orders = [ShuffledOrder(100, [0, 0]), ShuffledOrder(10, [0, 1], np.arange(1000, 1010))]
    order = MixedOrder(orders, [100, 25], same_shape_run=5, seed=0)
    items = [order.epoch_and_index(number)[1] for number in range(1250)]
    assert sum(item >= 1000 for item in items) == 250
    assert set(Counter(item for item in items if item >= 1000).values()) == {25}
    for number in range(0, 200):
        assert (order.replacement(number, 1) >= 1000) == (order.epoch_and_index(number)[1] >= 1000)  # of the same shape


def test_shards_are_read_a_few_at_a_time():
    """Two processes with two workers each, batches of 2, 8 lanes: whoever reads, reads few shards, and none of those that another one reads."""
    counts = [50] * 16
    order = ShardOrder(counts, 8, [0])
    shard_of = np.repeat(np.arange(16), 50)
    read: dict[tuple[int, int], list[int]] = {}
    for step in range(200):  # one pass
        for rank in range(2):
            for k in range(2):
                number = step * 4 + rank * 2 + k
                read.setdefault((rank, step % 2), []).append(int(shard_of[order.epoch_and_index(number)[1]]))
    for one, shards in read.items():
        assert len(set(shards)) == 4
        assert all(len(set(shards[k : k + 20])) <= 4 for k in range(len(shards)))
        assert all(not set(shards) & set(other) for key, other in read.items() if key != one)
    assert [order.epoch_and_index(n)[1] // 50 for n in range(8)] != [
        order.epoch_and_index(n + 800)[1] // 50 for n in range(8)
    ]
    assert all(shard_of[order.replacement(n, 1)] == shard_of[order.epoch_and_index(n)[1]] for n in range(100))


def test_the_bucket_that_suits_a_clip():
    shapes = [(1, 64, 64), (8, 64, 64), (16, 64, 64), (16, 48, 80), (16, 80, 48)]
    height, width = (
        np.array([480, 1080, 1920, 100, 240, 64.0, np.nan]),
        np.array([500, 1920, 1080, 100, 240, 64, np.nan]),
    )
    frames = np.array([300, 300, 300, 300, 30, 1, np.nan])
    duration = np.array([10.0, 10, 10, 1.5, 1.0, np.nan, np.nan])
    chosen = Buckets.assign(shapes, 8.0, height, width, frames, duration)
    assert chosen.tolist() == [2, 3, 4, 1, 1, 0, -1]
    assert Buckets.assign(shapes, None, height, width, frames, duration).tolist() == [2, 3, 4, 2, 2, 0, -1]
    assert Buckets.assign([(16, 80, 48)], 8.0, height, width, frames, duration).tolist() == [0, 0, 0, -1, -1, -1, -1]


@pytest.mark.parametrize(
    "shapes, said", [([], "buckets is .*at least 1 item"), ([(16, 64)], "16, 64"), ([(0, 64, 64)], "0, 64")]
)
def test_shapes_that_are_none(shapes, said):
    with pytest.raises(UserError, match=said):
        Buckets(shapes, np.zeros(1))
