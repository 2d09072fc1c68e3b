"""The parts of a step are told apart, and add up to it."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fixtures import tiny_training
from fixtures.tiny_training import LatentClips, one_thread, pipeline  # noqa: F401
from microcinema.profiling.step_timer import Watch, watching
from microcinema.training import trainer
from microcinema.training.settings import Settings


def test_parts_are_summed_and_steps_begin_where_the_last_one_ended():
    seconds = iter([10, 11, 13, 14, 20, 21, 30, 31, 33, 34, 35, 40])
    watch = Watch(lambda: next(seconds))
    watch.listen({"loss": 1.0})  # at 10
    watch.enter("forward")
    watch.leave("forward")  # 2
    with pytest.raises(ZeroDivisionError):
        watch.calls(lambda: 1 / 0, "backward")()  # 6
    watch.listen({"loss": 1.0})  # at 21
    watch.listen({"checkpoint_seconds": 9.0})  # at 30: no part of the next step
    watch.calls(lambda: None, "forward")()  # 2
    watch.calls(lambda: None, "forward")()  # 1
    watch.listen({"loss": 1.0})  # at 40
    assert watch.steps == [{"forward": 2, "backward": 6, "step": 11}, {"forward": 3, "step": 10}]


def test_latents_take_no_vae(tmp_path):
    settings = Settings(str(tmp_path / "run"), **{**tiny_training.SMALL, "max_train_steps": 3, "report_to": None})
    accelerator, model, clips = tiny_training.accelerator(settings), pipeline(tmp_path), LatentClips()
    ticks = iter(range(10**6))
    watch = Watch(lambda: next(ticks))
    with watching(watch, accelerator, model):
        trainer.train(accelerator, model, clips, settings, listen=watch.listen)
    assert len(watch.steps) == 2
    for step in watch.steps:
        assert "VAE" not in step
        assert (step["forward"], step["backward"], step["optimiser"]) == (1, 1, 1)  # between two looks at the clock
    assert "communication" not in watch.steps[0]


def test_communication_is_timed_and_changes_no_gradient(tmp_path):
    layer, x = nn.Linear(3, 4), torch.randn(2, 3)
    layer(x).sum().backward()
    wanted = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        watch = Watch(lambda: 0.0)
        spread = DistributedDataParallel(layer)
        spread.register_comm_hook(None, watch.communication)
        spread(x).sum().backward()
    finally:
        distributed.destroy_process_group()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(layer.parameters(), wanted, strict=True))
    watch.listen({"checkpoint_seconds": 0.0})
    watch.listen({"loss": 0.0})
    assert 0 < watch.steps[0]["communication"] < 10
