"""A run that meets a number that is not finite stops, on every process, and leaves the clips that it met."""

import json
import math
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open

from fixtures import tiny_training
from fixtures.tiny_training import LatentClips, PoisonedClips, logged, pipeline, train, weights
from microcinema.training import metrics
from microcinema.training.loss import make_loss_config
from microcinema.training.nan_guard import NanGuard
from microcinema.training.trainer import Trainer
from microcinema.utils.errors import UserError


def kept(path: Path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_clips(tmp_path):
    model = pipeline(tmp_path)
    settings = {"checkpointing_steps": 1, "train_batch_size": 1, "gradient_accumulation_steps": 2, "seed": 4}
    with pytest.raises(UserError, match=r"the loss is nan at step \d; .*step-\d-rank-00000.safetensors") as stopped:
        train(model, PoisonedClips(), tmp_path / "run", **settings)
    (path,) = (tmp_path / "run/not_finite").iterdir()
    step = int(path.name.split("-")[1])
    assert str(path) in str(stopped.value)
    tensors, about = kept(path)
    clips = json.loads(about["clips"])
    assert (about["step"], about["seed"]) == (str(step), "4")
    assert tensors["numbers"].tolist() == [clip["number"] for clip in clips] == [2 * step - 2, 2 * step - 1]
    ((place, clip),) = [(k, clip) for k, clip in enumerate(clips) if clip["caption"] == "poison"]
    assert clip["id"] == "clip-3"
    assert [not math.isfinite(loss) for loss in tensors["losses"]] == [k == place for k in range(2)]
    # What was random about the clips comes from what is kept.
    config = make_loss_config(model, tiny_training.make_config("x", seed=int(about["seed"])))
    noise = config.sample_noise_and_timesteps(tensors["numbers"].tolist(), tensors["latents"].shape[1:])
    assert torch.equal(noise.t, tensors["t"])
    sound = next(k for k in range(2) if k != place)
    assert torch.equal(
        tensors["latents"][sound], LatentClips()[int(clips[sound]["id"].removeprefix("clip-"))]["latents"]
    )
    assert not (tmp_path / f"run/checkpoint-{step}").exists()
    assert not (tmp_path / "run/model_index.json").exists()


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, logging_steps):
    norms = iter([1.0, math.inf, 1.0])
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    settings = {"max_train_steps": 3, "logging_steps": logging_steps}
    with pytest.raises(UserError, match="the gradient norm is inf at step 2"):
        train(pipeline(tmp_path), LatentClips(), tmp_path / "run", **settings)
    tensors, _ = kept(tmp_path / "run/not_finite/step-2-rank-00000.safetensors")
    assert tensors["numbers"].tolist() == [2, 3] and tensors["losses"].isfinite().all()


def test_the_first_step_of_an_interval_that_was_not_finite_is_named_and_nothing_of_it_is_saved(tmp_path, monkeypatch):
    """All weights are NaN when it is noticed, two steps later and before the checkpoint, the validation and the averages of that step."""
    model = pipeline(tmp_path)
    settings = {"checkpointing_steps": 2, "validation_steps": 3, "logging_steps": 100, "train_batch_size": 1}
    with pytest.raises(UserError, match="the loss is nan at step (\\d)") as stopped:
        train(model, PoisonedClips(), tmp_path / "run", validate=lambda *_: None, max_train_steps=8, **settings)
    (path,) = (tmp_path / "run/not_finite").iterdir()
    step = int(path.name.split("-")[1])
    tensors, about = kept(path)
    assert f"step {step};" in str(stopped.value) and tensors["numbers"].tolist() == [step - 1]
    assert [clip["caption"] for clip in json.loads(about["clips"])] == ["poison"]
    saved = [weights(folder) for folder in (tmp_path / "run").glob("checkpoint-*")]
    assert all(tensor.isfinite().all() for tensors in saved for tensor in tensors.values())
    assert all(int(folder.name.split("-")[1]) < step for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert any(not parameter.isfinite().all() for parameter in model.unet.parameters())


def test_a_loss_scale_that_is_too_large_is_lowered_and_the_run_goes_on(tmp_path, monkeypatch):
    """As with mixed_precision=fp16 on a GPU: the optimizer skips the steps whose gradients overflow, on the device."""
    model, config = pipeline(tmp_path), tiny_training.make_config(tmp_path / "run", max_train_steps=4, logging_steps=2)
    before = {name: parameter.clone() for name, parameter in model.unet.named_parameters()}
    accelerator = tiny_training.accelerator(config)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    monkeypatch.setattr(metrics, "peak_flops", lambda *_: 1.0)  # some processors take seconds for it in fp16
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11)
    trainer = Trainer(accelerator, model, LatentClips(), config)
    # accelerate does so on a GPU alone.
    monkeypatch.setattr(accelerator, "unscale_gradients", lambda: scaler.unscale_(trainer.optimizer.optimizer))
    trained = next(iter(trainer.trained.values()))
    trained.register_hook(lambda gradient: gradient * (math.inf if scaler.get_scale() > 2**10 else 1))
    run = trainer.train()
    norms = logged(run, "grad_norm")
    assert not math.isfinite(norms[2]) and 0 < norms[4] < math.inf
    assert not (run / "not_finite").exists()
    assert all(tensor.isfinite().all() for tensor in weights(run / "checkpoint-4").values())
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.unet.named_parameters())


def test_only_the_process_that_met_it_keeps_its_clips(tmp_path):
    """As both processes of two see it; a real run of two is in test_trainer.py."""
    losses = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.1, 0.2], [0.3, math.nan]], [[math.nan] * 2] * 2])
    messages = []
    for rank in range(2):
        guard = NanGuard(types.SimpleNamespace(process_index=rank, wait_for_everyone=lambda: None), tmp_path, seed=0)
        for step in range(3):
            items = {"sample_index": 2 * step + torch.arange(2), "caption": ["a", "b"]}
            guard.record(6 + step, items, torch.zeros(2, 1), torch.zeros(2), losses[step, rank])
        with pytest.raises(UserError) as stopped:
            guard.assert_finite(losses, torch.tensor([1.0, math.nan, math.nan]))
        messages.append(str(stopped.value))
    (path,) = (tmp_path / "not_finite").iterdir()
    assert path.name == "step-7-rank-00001.safetensors"
    assert kept(path)[0]["numbers"].tolist() == [2, 3]
    assert messages[0] == messages[1] and f"saved in '{path}'; lower" in messages[0]
