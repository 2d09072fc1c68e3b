import contextlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures import tiny_training
from fixtures.tiny_training import LatentClips, pipeline, train, weights
from microcinema.training.checkpoint import Checkpoints
from microcinema.training.loss import TrainableModel
from microcinema.training.resume import Progress, choose_checkpoint, find_checkpoints, read_state
from microcinema.utils.errors import UserError
from microcinema.utils.hashing import checksum_error, write_checksums

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
    # A diffusers folder that opens by itself.
    assert {path.name for path in (folder / "unet").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    found = {path.name for path in folder.iterdir()}
    assert found == {
        "unet", "ema.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "training_state.json", "SHA256SUMS"
    }  # fmt: skip
    assert not list(finished.glob(".*"))


def test_a_finished_run_that_is_resumed_saves_the_same_model_again(finished, broken):
    resume(broken)
    one, other = weights(finished / "unet"), weights(broken.parent / "unet")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Hostile:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch written",)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_a_checkpoint_runs_no_code(broken, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    torch.save(Hostile(), broken / name)
    write_checksums(broken)
    with contextlib.suppress(UserError, RuntimeError, KeyError):  # or it is resumed without that file
        resume(broken)
    assert not (tmp_path / "written").exists()


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
        make(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-200").mkdir()  # not one of ours: nothing says so
    assert choose_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-100"
    assert choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-90")) == tmp_path / "checkpoint-90"
    with pytest.raises(UserError, match=r"checkpoint-70' is not a checkpoint .* holds: checkpoint-90, checkpoint-100"):
        choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-70"))
    with pytest.raises(UserError, match="already holds checkpoint-100; set resume_from_checkpoint=latest"):
        choose_checkpoint(tmp_path, None)


def make(folder: Path) -> None:
    folder.mkdir()
    (folder / "training_state.json").write_text("{}")
    (folder / "optimizer.bin").write_bytes(bytes(1000))
    write_checksums(folder)


def flip(file: Path) -> None:
    """One bit of one byte."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "a missing file": (lambda folder: (folder / "optimizer.bin").unlink(), "optimizer.bin: No such file"),
    "a truncated file": (
        lambda folder: os.truncate(folder / "optimizer.bin", 500),
        "optimizer.bin does not match its checksum",
    ),
    "a flipped bit": (lambda folder: flip(folder / "optimizer.bin"), "optimizer.bin does not match its checksum"),
    "no state": (lambda folder: (folder / "training_state.json").unlink(), "training_state.json: No such file"),
    "no checksums": (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
    "empty checksums": (lambda folder: os.truncate(folder / "SHA256SUMS", 0), "SHA256SUMS is empty"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_newest_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    spoil, fault = DAMAGES[damage]
    for step in (90, 100):
        make(tmp_path / f"checkpoint-{step}")
    spoil(tmp_path / "checkpoint-100")
    said: list[str] = []
    assert choose_checkpoint(tmp_path, "latest", said.append) == tmp_path / "checkpoint-90"
    (line,) = said
    assert line.startswith(f"checkpoint-100 is damaged ({fault}") and "\n" not in line
    with pytest.raises(UserError, match=r"checkpoint-100' is damaged \("):  # what was asked for by name is not replaced
        choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-100"))
    spoil(tmp_path / "checkpoint-90")
    with pytest.raises(UserError, match="all 2 checkpoints in .* are damaged"):
        choose_checkpoint(tmp_path, "latest", said.append)


def test_a_run_goes_on_from_the_last_whole_checkpoint_and_replaces_the_broken_one(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    flip(run / "checkpoint-2/unet/diffusion_pytorch_model.safetensors")
    (run / f".checkpoint-3.{2**22 + 1}.microcinema-partial/unet").mkdir(
        parents=True
    )  # of a process that was killed in a save
    train(pipeline(tmp_path), LatentClips(), run, max_train_steps=2, resume_from_checkpoint="latest", report_to=None)
    assert "checkpoint-2 is damaged (unet/diffusion_pytorch_model.safetensors does not match" in capsys.readouterr().out
    one, other = weights(finished / "checkpoint-2"), weights(run / "checkpoint-2")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert checksum_error(run / "checkpoint-2") is None
    assert not list(run.glob(".*"))


def test_going_back_deletes_nothing_newer(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "checkpoint-2").rename(run / "checkpoint-9")
    settings = {"max_train_steps": 3, "checkpoints_total_limit": 1, "checkpointing_steps": 10, "report_to": None}
    train(pipeline(tmp_path), LatentClips(), run, resume_from_checkpoint=str(run / "checkpoint-1"), **settings)
    assert [path.name for path in find_checkpoints(run)] == ["checkpoint-3", "checkpoint-9"]


def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path, capsys):
    """A real one: a file system in memory that has room for one checkpoint and a half."""
    run = tmp_path / "disk"
    run.mkdir()
    model = pipeline(tmp_path)
    size = 4 * sum(p.numel() for p in model.unet.parameters())
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={7 * size}", "tmpfs", run], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        train(model, LatentClips(), run, max_train_steps=1, report_to=None, trainable_parameters="all")
        shutil.rmtree(run / "unet")  # of the finished pipeline: only checkpoints are wanted here
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        settings = {
            "max_train_steps": 2,
            "resume_from_checkpoint": "latest",
            "report_to": None,
            "trainable_parameters": "all",
        }
        with pytest.raises(UserError, match="cannot write .*checkpoint-2'.*; make room") as error:
            train(pipeline(tmp_path), LatentClips(), run, **settings)
        assert "\n" not in str(error.value)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        assert checksum_error(run / "checkpoint-1") is None
    finally:
        subprocess.run(["umount", "--lazy", run], check=True)


def test_every_random_state_comes_back(tmp_path):
    model = pipeline(tmp_path)
    accelerator = tiny_training.accelerator(tiny_training.make_config(tmp_path, max_train_steps=1))
    denoiser = TrainableModel(model.unet)
    optimizer = torch.optim.AdamW(denoiser.parameters())
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
    checkpoints = Checkpoints(accelerator, tmp_path, denoiser, dict(denoiser.named_parameters()), None)
    folder = checkpoints.save(Progress(step=3, clips=12))
    wanted = (random.random(), np.random.rand(), torch.rand(3).tolist())  # noqa: NPY002
    assert checkpoints.load(folder) == Progress(step=3, clips=12)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == wanted  # noqa: NPY002


STATES = {
    "no object": "[]",
    "a number": "3",
    "no progress": '{"trained": [], "run": null}',
    "progress of another kind": '{"progress": {"step": "x", "clips": []}, "trained": [], "run": null}',
    "more progress": '{"progress": {"step": 1, "clips": 1, "epoch": 1}, "trained": [], "run": null}',
    "nothing trained": '{"progress": {"step": 1, "clips": 1}, "trained": null, "run": null}',
    "a run of another kind": '{"progress": {"step": 1, "clips": 1}, "trained": [], "run": 3}',
}


@pytest.mark.parametrize("state", STATES)
def test_a_damaged_state_is_told_though_its_checksum_is_right(tmp_path, state):
    (tmp_path / "training_state.json").write_text(STATES[state])
    with pytest.raises(UserError, match="cannot be read"):
        read_state(tmp_path)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin"])
@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02N.", b"garbage"])
def test_a_damaged_file_is_told_though_its_checksum_is_right(broken, name, content):
    (broken / name).write_bytes(content)
    write_checksums(broken)
    with pytest.raises(UserError, match=r"checkpoint-2' cannot be read") as error:
        resume(broken)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"garbage", None])
def test_random_states_that_cannot_be_restored_are_told(broken, content, capsys):
    file = broken / "random_states_0.pkl"
    file.write_bytes(content) if content else file.unlink()
    write_checksums(broken)
    resume(broken)
    assert "random states of process 0 are not restored from" in capsys.readouterr().out


def test_keys_that_do_not_fit_are_named(broken):
    file = broken / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[-1]
    tensors["stray.weight"] = tensors.pop(first)
    tensors["conv_in.bias"] = torch.zeros(3)
    save_file(tensors, file)
    write_checksums(broken)
    with pytest.raises(UserError) as error:
        resume(broken)
    message = str(error.value)
    assert f"missing 1 ({first})" in message and "unexpected 1 (stray.weight)" in message
    assert "conv_in.bias (3,) for (32,)" in message and "\n" not in message


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda folder: (folder / "optimizer.bin").write_bytes(b"not a pickle"), "cannot be read"),
        (lambda folder: (folder / "training_state.json").write_text("{"), "cannot be read"),
        (lambda folder: shutil.rmtree(folder / "unet"), "unet' holds no .safetensors"),
        (lambda folder: (folder / "ema.safetensors").unlink(), "set use_ema=false"),
        (lambda folder: os.truncate(folder / "unet/diffusion_pytorch_model.safetensors", 1000), "cannot be read"),
    ],
)
def test_a_checkpoint_that_was_never_right_is_refused_in_one_line(broken, spoil, told):
    spoil(broken)
    write_checksums(broken)
    with pytest.raises(UserError, match=told) as error:
        resume(broken)
    assert "\n" not in str(error.value)
    assert not (broken.parent / "model_index.json").exists()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"seed": 1}, "seed was 0 and is 1; resume"),
        ({"learning_rate": 2e-3}, "learning_rate was 0.001 and is 0.002"),
        ({"adam_beta1": 0.5}, "adam_beta1 was 0.9 and is 0.5"),
    ],
)
def test_settings_of_another_run_are_refused(broken, changes, told):
    with pytest.raises(UserError, match="is of another run: .*init_weights_from") as error:
        resume(broken, **changes)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_other_clips_and_another_objective_are_refused(broken):
    settings = {"max_train_steps": STEPS, "resume_from_checkpoint": str(broken), "report_to": None}
    with pytest.raises(UserError, match="of another run: clips was [0-9a-f]{12}... and is [0-9a-f]{12}...; resume"):
        train(pipeline(broken), LatentClips(6), broken.parent, **settings)
    other = pipeline(broken, noise_prior="appearance", noise_prior_strength=0.5)
    with pytest.raises(UserError, match="noise_prior_strength was 0.03 and is 0.5"):
        train(other, LatentClips(), broken.parent, **settings)


def test_what_may_differ_is_told_in_one_line(broken, capsys):
    resume(broken, train_batch_size=1, gradient_accumulation_steps=2, max_grad_norm=0.5)
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "other settings" in each]
    assert line == (
        f"resuming checkpoint-{STEPS} with other settings: train_batch_size was 2 and is 1; "
        "gradient_accumulation_steps was 1 and is 2; max_grad_norm was 1.0 and is 0.5"
    )


def test_other_trained_parameters_are_refused(broken):
    with pytest.raises(UserError, match=r"trained other parameters \(\d+ missing, 0 unexpected"):
        resume(broken, trainable_parameters="all")
