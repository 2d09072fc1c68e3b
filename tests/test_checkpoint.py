import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_training
import torch
from safetensors.torch import load_file, save_file
from tiny_training import LatentClips, one_thread, pipeline, train, weights  # noqa: F401

from microcinema.errors import UserError
from microcinema.training import checkpoint
from microcinema.training.checkpoint import Checkpoints, Progress, choose_checkpoint, find_checkpoints
from microcinema.training.settings import Settings
from microcinema.training.step import Denoiser

STEPS = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    return train(pipeline(folder), LatentClips(), folder / "run", max_train_steps=STEPS, checkpointing_steps=1)


@pytest.fixture
def broken(finished, tmp_path) -> Path:
    """A copy of its last checkpoint, for a test to spoil."""
    return Path(shutil.copytree(finished / f"checkpoint-{STEPS}", tmp_path / "run" / f"checkpoint-{STEPS}"))


def resume(folder: Path, **settings) -> None:
    """Loads a checkpoint into a new model; there is no step left to do."""
    output_dir = folder.parent
    train(
        pipeline(output_dir),
        LatentClips(),
        output_dir,
        **{"max_train_steps": STEPS, "resume_from_checkpoint": str(folder), "report_to": None, **settings},
    )


def test_a_checkpoint_describes_itself(finished):
    folder = finished / f"checkpoint-{STEPS}"
    state = json.loads((folder / "training_state.json").read_text())
    assert state["progress"] == {"step": STEPS, "clips": 2 * STEPS}
    assert load_file(folder / "ema.safetensors").keys() == set(state["trained"])
    for name in ("unet", "condition_encoder"):  # diffusers folders that open by themselves
        assert {path.name for path in (folder / name).iterdir()} == {
            "config.json",
            "diffusion_pytorch_model.safetensors",
        }
    found = {path.name for path in folder.iterdir()}
    assert found == {
        "unet", "condition_encoder", "ema.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "training_state.json"
    }  # fmt: skip
    assert not list(finished.glob(".*"))


def test_a_finished_run_that_is_resumed_saves_the_same_model_again(finished, broken):
    resume(broken)
    one, other = weights(finished / "unet"), weights(broken.parent / "unet")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_only_the_newest_checkpoints_stay(tmp_path):
    run = train(
        pipeline(tmp_path),
        LatentClips(),
        tmp_path / "run",
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        report_to=None,
    )
    assert [path.name for path in find_checkpoints(run)] == ["checkpoint-3", "checkpoint-4"]


def test_which_checkpoint_is_chosen(tmp_path):
    assert choose_checkpoint(tmp_path, None) is None
    assert choose_checkpoint(tmp_path, "latest") is None
    for step in (90, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/training_state.json").write_text("{}")
    (tmp_path / "checkpoint-200").mkdir()  # not one of ours: nothing says so
    assert choose_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-100"
    assert choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-90")) == tmp_path / "checkpoint-90"
    with pytest.raises(UserError, match=r"checkpoint-70' is not a checkpoint .* holds: checkpoint-90, checkpoint-100"):
        choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-70"))
    with pytest.raises(UserError, match="already holds checkpoint-100; set resume_from_checkpoint=latest"):
        choose_checkpoint(tmp_path, None)


def test_a_save_that_fails_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    def full_disk(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    model, run = pipeline(tmp_path), tmp_path / "run"
    train(model, LatentClips(), run, max_train_steps=1, report_to=None)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(UserError, match="checkpoint-2.*No space left"):
        train(
            pipeline(tmp_path), LatentClips(), run, max_train_steps=2, resume_from_checkpoint="latest", report_to=None
        )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_every_random_state_comes_back(tmp_path):
    model = pipeline(tmp_path)
    accelerator = tiny_training.accelerator(Settings(str(tmp_path), max_train_steps=1))
    denoiser = Denoiser(model.unet, model.condition_encoder)
    optimizer = torch.optim.AdamW(denoiser.parameters())
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
    checkpoints = Checkpoints(accelerator, tmp_path, dict(denoiser.named_parameters()), None)
    folder = checkpoints.save(Progress(step=3, clips=12))
    wanted = (random.random(), np.random.rand(), torch.rand(3).tolist())  # noqa: NPY002
    assert checkpoints.load(folder) == Progress(step=3, clips=12)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == wanted  # noqa: NPY002


def test_keys_that_do_not_fit_are_named(broken):
    file = broken / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[-1]
    tensors["stray.weight"] = tensors.pop(first)
    tensors["conv_in.bias"] = torch.zeros(3)
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        resume(broken)
    message = str(error.value)
    assert f"missing 1 ({first})" in message and "unexpected 1 (stray.weight)" in message
    assert "conv_in.bias (3,) for (32,)" in message and "\n" not in message


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda folder: (folder / "optimizer.bin").unlink(), "optimizer.bin"),
        (lambda folder: (folder / "optimizer.bin").write_bytes(b"not a pickle"), "cannot be read"),
        (lambda folder: (folder / "training_state.json").write_text("{"), "cannot be read"),
        (lambda folder: shutil.rmtree(folder / "condition_encoder"), "condition_encoder' holds no .safetensors"),
        (lambda folder: (folder / "ema.safetensors").unlink(), "set use_ema=false"),
        (lambda folder: truncate(folder / "unet/diffusion_pytorch_model.safetensors"), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(broken, spoil, told):
    spoil(broken)
    with pytest.raises(UserError, match=told) as error:
        resume(broken)
    assert "\n" not in str(error.value)
    assert not (broken.parent / "model_index.json").exists()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def test_other_trained_parameters_are_refused(broken):
    with pytest.raises(UserError, match=r"trained other parameters \(\d+ missing, 0 unexpected"):
        resume(broken, train="all")
