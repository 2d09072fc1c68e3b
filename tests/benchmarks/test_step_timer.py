"""The parts of a step are told apart, and add up to it."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step_timer import StepTimer
from fixtures import tiny_training
from fixtures.tiny_training import LatentClips, pipeline
from microcinema.training.trainer import Trainer


def test_parts_are_summed_and_steps_start_where_the_last_one_ended():
    seconds = iter([10, 11, 13, 14, 20, 21, 30, 31, 33, 34, 35, 40])
    timer = StepTimer(lambda: next(seconds))
    timer.on_metrics({"loss": 1.0})  # at 10
    with timer.region("forward"):  # 2
        pass
    with pytest.raises(ZeroDivisionError), timer.region("backward"):  # 6
        1 / 0  # noqa: B018
    timer.on_metrics({"loss": 1.0})  # at 21
    timer.on_metrics({"checkpoint_seconds": 9.0})  # at 30: no part of the next step
    with timer.region("forward"):  # 2
        pass
    with timer.region("forward"):  # 1
        pass
    timer.on_metrics({"loss": 1.0})  # at 40
    assert timer.steps == [{"forward": 2, "backward": 6, "step": 11}, {"forward": 3, "step": 10}]


def test_latents_take_no_vae(tmp_path):
    settings = tiny_training.make_config(tmp_path / "run", **{"max_train_steps": 3, "report_to": None})
    accelerator, model, clips = tiny_training.accelerator(settings), pipeline(tmp_path), LatentClips()
    ticks = iter(range(10**6))
    timer = StepTimer(lambda: next(ticks))
    Trainer(accelerator, model, clips, settings, on_metrics=timer.on_metrics, region=timer.region).train()
    assert len(timer.steps) == 2
    for step in timer.steps:
        assert "VAE" not in step
        assert (step["forward"], step["backward"], step["optimizer"]) == (1, 1, 1)  # between two readings of the clock
    assert "communication" not in timer.steps[0]


def test_a_profile_of_torch_names_the_parts(tmp_path):
    settings = tiny_training.make_config(tmp_path / "run", **{"max_train_steps": 1, "report_to": None})
    trainer = Trainer(tiny_training.accelerator(settings), pipeline(tmp_path), LatentClips(), settings)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.train()
    assert {"encoders", "forward", "backward", "optimizer"} <= {event.key for event in profile.key_averages()}


def test_communication_is_timed_and_changes_no_gradient(tmp_path):
    layer, x = nn.Linear(3, 4), torch.randn(2, 3)
    layer(x).sum().backward()
    wanted = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        timer = StepTimer(lambda: 0.0)
        spread = DistributedDataParallel(layer)
        spread.register_comm_hook(None, timer.communication)
        spread(x).sum().backward()
        # Before the group: its last owner would wait for the group's threads with the interpreter's lock, which they may need.
        del spread
    finally:
        distributed.destroy_process_group()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(layer.parameters(), wanted, strict=True))
    timer.on_metrics({"checkpoint_seconds": 0.0})
    timer.on_metrics({"loss": 0.0})
    assert 0 < timer.steps[0]["communication"] < 10
