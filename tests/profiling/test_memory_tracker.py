import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from microcinema.profiling.memory_tracker import LiveMemory

KB = 1024


def kilobytes(count: int, **options) -> torch.Tensor:
    return torch.zeros(count * KB // 4, **options)


@pytest.fixture(params=["real", "fake"])
def live(request):
    """Within it tensors are made and counted."""
    if request.param == "fake":
        with FakeTensorMode(), LiveMemory() as memory:
            yield memory
    else:
        with LiveMemory() as memory:
            yield memory


def test_a_tensor_counts_from_its_birth_to_its_release(live):
    a = kilobytes(4)
    b = a + 1
    assert live.now == 8 * KB
    del a
    assert (live.now, live.peak) == (4 * KB, 8 * KB)
    b = b * 2  # the old one lives until the new one is there
    assert (live.now, live.peak) == (4 * KB, 8 * KB)
    del b
    assert live.now == 0


def test_views_and_work_in_place_cost_nothing(live):
    a = kilobytes(4)
    view = a.view(2, -1)[1].detach()
    a.add_(1)
    assert live.peak == 4 * KB
    del a
    assert live.now == 4 * KB  # the view holds the whole storage
    del view
    assert live.now == 0


def test_temporaries_between_two_operations_are_in_the_peak(live):
    a = kilobytes(4)
    b = (a * 2 + 1).sum()
    assert live.now == 4 * KB + b.nbytes
    assert live.peak == 12 * KB


def test_what_autograd_keeps_is_alive_until_backward(live):
    weight = kilobytes(4, requires_grad=True)
    loss = (weight * 2).square().sum()
    held = live.now
    assert held == 8 * KB + loss.nbytes  # square keeps its input
    loss.backward()
    assert live.now == 8 * KB + loss.nbytes  # the gradient is as large as what was released
    weight.grad = None
    assert live.now == 4 * KB + loss.nbytes


def test_the_peak_can_start_anew(live):
    a = kilobytes(4)
    del a
    assert live.reset_peak() == 4 * KB
    b = kilobytes(2)
    assert (live.now, live.peak) == (2 * KB, 2 * KB)
    del b


def test_what_was_there_before_counts_when_it_is_shown():
    layer = torch.nn.Linear(16, 16, bias=False)
    with LiveMemory() as live:
        assert live.now == 0
        live.watch([*layer.parameters(), layer.weight.detach()])
        assert live.now == layer.weight.nbytes
        del layer
        assert live.now == 0
