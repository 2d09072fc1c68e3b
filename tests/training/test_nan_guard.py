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
from fixtures.tiny_training import LatentClips, PoisonedClips, logged, pipeline, train
from microcinema.training.loss import make_loss_config
from microcinema.training.nan_guard import NanGuard
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


@pytest.mark.parametrize("scaled", [False, True], ids=["", "loss scale too large"])
def test_a_gradient_that_is_not_finite_stops_the_run_unless_the_step_was_skipped(tmp_path, monkeypatch, scaled):
    norms = iter([1.0, math.inf, 1.0])
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    if scaled:  # as a scaler of fp16 does
        monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
        run = train(pipeline(tmp_path), LatentClips(), tmp_path / "run", max_train_steps=3)
        assert logged(run, "grad_norm") == {1: 1.0, 2: math.inf, 3: 1.0}
        assert not (run / "not_finite").exists()
    else:
        with pytest.raises(UserError, match="the gradient norm is inf at step 2"):
            train(pipeline(tmp_path), LatentClips(), tmp_path / "run", max_train_steps=3)
        tensors, _ = kept(tmp_path / "run/not_finite/step-2-rank-00000.safetensors")
        assert tensors["numbers"].tolist() == [2, 3] and tensors["losses"].isfinite().all()


def test_only_the_process_that_met_it_keeps_its_clips(tmp_path):
    """As both processes of two see it; a real run of two is in test_trainer.py."""
    losses = torch.tensor([[0.1, 0.2], [0.3, math.nan]])
    messages = []
    for rank in range(2):
        guard = NanGuard(types.SimpleNamespace(process_index=rank, wait_for_everyone=lambda: None), tmp_path, seed=0)
        guard.record(
            {"sample_index": torch.arange(2), "caption": ["a", "b"]}, torch.zeros(2, 1), torch.zeros(2), losses[rank]
        )
        with pytest.raises(UserError) as stopped:
            guard.assert_finite(7, losses, math.nan)
        messages.append(str(stopped.value))
    (path,) = (tmp_path / "not_finite").iterdir()
    assert path.name == "step-7-rank-00001.safetensors"
    assert messages[0] == messages[1] and f"saved in '{path}'; lower" in messages[0]
