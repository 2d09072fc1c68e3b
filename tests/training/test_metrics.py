"""What is told of a step is arithmetic on what happened in it."""

import time
import types

import pytest
import torch
from torch import nn

from microcinema.training import metrics


@pytest.fixture
def now(monkeypatch):
    """The time, to be set."""
    clock = types.SimpleNamespace(time=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.time)
    return clock


def make(monkeypatch, processes: int = 1) -> metrics.StepMetrics:
    monkeypatch.setattr(metrics, "peak_flops", lambda device, dtype: 1000.0 if dtype == torch.bfloat16 else 1.0)
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), mixed_precision="bf16", num_processes=processes, gather=lambda rows: rows
    )
    return metrics.StepMetrics(accelerator, num_train_timesteps=1000)


def test_utilisation_is_operations_over_time_and_the_peak_of_the_precision(monkeypatch, now):
    one = make(monkeypatch)
    layer = nn.Linear(2, 2, bias=False)
    for clips in (3, 5):
        with one.count_flops({"latents": torch.zeros(clips, 1)}):
            layer(torch.randn(clips, 2)).sum().backward()  # 8 operations a row in forward, 8 for the weight
    with one.count_flops({"latents": torch.zeros(3, 1)}):  # of a shape that is known: nobody looks
        pass
    one.add(torch.tensor([1.0, 3.0]), torch.tensor([0, 999]))
    now.time = 0.5
    one.end_step(None)
    figures = one.finish_interval()
    assert figures["mfu"] == pytest.approx(16 * (3 + 5 + 3) / 0.5 / 1000)
    assert figures["clips_per_second"] == 4
    assert (figures["loss"], figures["loss/t1"], figures["loss/t4"]) == (2, 1, 3)
    assert "loss/t2" not in figures
    now.time = 1.0
    one.add(torch.tensor([1.0]), torch.tensor([0]))
    one.end_step(None)
    assert one.finish_interval()["mfu"] == 0  # what was counted was of the interval before


def test_losses_are_told_by_step_and_process(monkeypatch, now):
    two = make(monkeypatch, processes=2)
    first, second = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([[5.0, 6.0], [7.0, 8.0]]),
    )  # (steps, clips) of each
    monkeypatch.setattr(
        two.accelerator,
        "gather",
        lambda rows: torch.cat([rows, torch.stack([second.flatten(), 999 + 0 * rows[:, 1]], 1)]),
    )
    for step, losses in enumerate(first):
        for loss in losses.split(1):  # micro-batches
            two.add(loss, torch.tensor([0]))
        two.end_step(torch.tensor(float(step)))
    now.time = 2.0
    figures = two.finish_interval()
    assert two.losses.tolist() == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]
    assert two.grad_norms.tolist() == [0, 1]
    assert (figures["loss"], figures["loss/t1"], figures["loss/t4"], figures["grad_norm"]) == (4.5, 2.5, 6.5, 0.5)
    assert figures["clips_per_second"] == 4 and two.recent_loss == 4.5
    two.add(torch.tensor([9.0]), torch.tensor([0]))
    now.time = 3.0
    two.end_step(None)
    monkeypatch.setattr(two.accelerator, "gather", lambda rows: rows.repeat(2, 1))
    figures = two.finish_interval()
    assert figures["loss"] == 9 and two.losses.tolist() == [[[9], [9]]]  # nothing of the interval before
    assert "grad_norm" not in figures and not len(two.grad_norms)


def test_what_is_done_aside_is_no_part_of_a_step(monkeypatch, now):
    one = make(monkeypatch)
    with one.paused():
        now.time = 7.0
    assert one.paused_seconds == 7
    one.add(torch.tensor([1.0]), torch.tensor([0]))
    now.time = 8.0
    one.end_step(None)
    assert one.finish_interval()["clips_per_second"] == 1
