"""Counting launches and bytes."""

import torch

from benchmarks.counts import LaunchCounter


def test_operations_and_the_bytes_of_their_tensors_are_counted_and_views_are_not():
    x = torch.zeros(4, 8)
    with LaunchCounter() as counter:
        y = x + x  # reads and writes three times 32 numbers
        y[:, 1:].add_(1)  # reads and writes two times 28
        y.reshape(8, 4).t().unsqueeze(0).detach()
    assert (counter.launches, counter.bytes) == (2, 4 * (3 * 32 + 2 * 28))


def test_the_backward_is_counted():
    x = torch.ones(2, 3, requires_grad=True)
    with LaunchCounter() as forward:
        out = (x * 2).sum()
    with LaunchCounter() as backward:
        out.backward()
    assert forward.launches == 2 and backward.launches >= 2
