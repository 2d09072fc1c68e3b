"""The held-out loss: closed forms, that only the network changes it, and what a run logs of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from fixtures import tiny, tiny_training
from fixtures.launched_processes import Processes
from fixtures.tiny_training import LatentClips, logged, pipeline
from microcinema.commands import cli
from microcinema.data.clips import ClipDataset
from microcinema.data.indexed import IndexedDataset
from microcinema.data.quarantine import Quarantine, read_quarantine
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.rng import generator
from microcinema.diffusion.schedule import signal_and_noise
from microcinema.pipelines.saving import load_pipeline
from microcinema.sprites.dataset import write_dataset
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.training.checkpoint import Checkpoints
from microcinema.training.heldout_loss import LEVELS, SEED, HeldOutLoss, figures, measure_clip
from microcinema.training.loss import Batch, LossConfig, make_loss_config
from microcinema.utils.errors import UserError

SHAPE = (1, 3, 4, 2, 2)
TIMES = [100, 300, 500, 700, 900]
NAMES = ["loss", *(f"loss/t={t}" for t in TIMES), "moving_loss", "text_sensitivity"]


def config(kind: str = "epsilon", **changes: Any) -> LossConfig:
    scheduler = DDPMScheduler(clip_sample=False, prediction_type=kind)
    rest = {"snr_gamma": 5.0, "motion_weight": 9.0, "timestep_logit_normal": (3.0, 1.0), "flow_weight": 0.0}
    dropout = {"text_dropout": 1.0, "image_dropout": 1.0}  # nothing that training weights, draws or drops counts here
    return LossConfig(scheduler, NoisePrior("appearance", 0.5), "center", **{**rest, **dropout, "seed": 7, **changes})


def clip(number: int = 0) -> Batch:
    source = generator(5, number)
    text = torch.randn(1, 5, 6, generator=source)
    return Batch(torch.randn(SHAPE, generator=source), text, torch.full((1,), 8.0), [number])


def measure(denoiser: Any, settings: LossConfig, clips: list[Batch]) -> dict[str, float]:
    others = [replace(batch, text=batch.text + 1) for batch in clips]
    errors = [measure_clip(denoiser, *pair, settings) for pair in zip(clips, others, strict=True)]
    return figures(np.stack(errors))


# What is measured


def test_a_constant_prediction_has_its_mean_square():
    """Of clean latents; at every time, and whatever the noise."""
    clips = [clip(0), clip(1)]
    found = measure(lambda z_t, *_, **__: (torch.full_like(z_t, 0.5), None), config("sample"), clips)
    assert list(found) == NAMES and len(TIMES) == LEVELS
    expected = np.mean([((batch.latents - 0.5) ** 2).mean() for batch in clips])
    assert [found[name] for name in NAMES[:-2]] == pytest.approx([expected] * 6)
    assert found["text_sensitivity"] == 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_oracle_has_no_loss(kind: str):
    """It knows the clip, and tells its noise from it; each clip at each time has other noise, no run's seed changes it."""
    settings, batch, seen = config(kind), clip(), []

    def oracle(z_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, z_ref: torch.Tensor, fps: Any, image_mask: Any):
        assert image_mask.all() and torch.equal(z_ref, batch.latents[:, 1])
        signal, sigma = signal_and_noise(settings.scheduler, t, z_t)
        noise = (z_t - signal * batch.latents) / sigma
        seen.append((int(t), noise - 0.5 * z_ref[:, None]))
        target = {"epsilon": noise, "v_prediction": signal * noise - sigma * batch.latents, "sample": batch.latents}
        return target[kind], None

    found = measure(oracle, settings, [batch])
    assert max(found[name] for name in NAMES[:-1]) < 1e-8
    assert [t for t, _ in seen[::2]] == TIMES
    noises = torch.stack([noise for _, noise in seen[::2]])
    assert noises.std().item() == pytest.approx(1, abs=0.15)
    assert torch.corrcoef(noises.flatten(1)).fill_diagonal_(0).abs().max() < 0.5
    seen.clear()
    measure(oracle, replace(settings, seed=8), [batch])
    assert torch.allclose(torch.stack([noise for _, noise in seen[::2]]), noises)


def test_moving_places_count_as_far_as_they_depart_from_the_key_frame():
    """One place departs by 0.25 in one frame, one by more than counts; errors of 1, 2 and 3 there and elsewhere."""
    latents = torch.zeros(SHAPE)
    latents[:, 2, :, 0, 0], latents[:, 0, :, 1, 1] = 0.25, -7.0
    error = torch.tensor([[1.0, 3.0], [3.0, 2.0]])

    def denoiser(z_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        return latents + error * (1 + text.mean()), None

    batch = replace(clip(), latents=latents, text=torch.zeros(1, 5, 6))
    still = replace(batch, latents=torch.zeros(SHAPE))  # adds nothing
    found = measure(denoiser, config("sample"), [batch])
    assert found["loss"] == pytest.approx((1 + 4 + 9 + 9) / 4)
    assert found["moving_loss"] == pytest.approx((0.25 * 1 + 1 * 4) / 1.25)
    assert found["text_sensitivity"] == pytest.approx(3)  # the wrong text is 1, which doubles the error
    both = measure(denoiser, config("sample"), [batch, still])
    assert both["moving_loss"] == pytest.approx(found["moving_loss"])
    assert list(measure(denoiser, config("sample"), [still])) == NAMES[:-2]


# The clips


def held_out(dataset: Any, model: Any, folder: Path, count: int = 4, quarantine: Quarantine | None = None):
    settings = tiny_training.make_config(folder, max_train_steps=1)
    accelerator = tiny_training.accelerator(settings)
    clips = IndexedDataset(dataset, SEED, quarantine)
    encode = BatchEncoder(model, accelerator.device)
    return accelerator, HeldOutLoss(accelerator, encode, make_loss_config(model, settings), clips, count, folder)


def test_each_clip_is_compared_with_another_caption(tmp_path: Path):
    model = pipeline(tmp_path)
    _, measured = held_out(LatentClips(5), model, tmp_path, count=9)  # no clip twice
    assert list(measured.clips) == [0, 1, 2, 3, 4]
    two = model.encode_text(["a red star 0", "a red star 1"])
    for i, content in measured.clips.items():
        own = next(k for k in (0, 1) if torch.allclose(content["text"][0], two[k], atol=1e-5))
        other = measured.with_caption_of_another(i, Batch(**content))
        torch.testing.assert_close(other.text[0], two[1 - own])
        assert torch.equal(other.latents, content["latents"])


def test_a_model_with_motion_captions_keeps_its_description(tmp_path: Path):
    write_dataset(tmp_path / "clips", num_videos=3, seed=1)
    data = ClipDataset(tmp_path / "clips/clips.csv", tmp_path / "clips", 4, 8.0, tiny.SIZE)
    model = tiny.video_pipeline(tmp_path / "model", model="factorized_dreamer")
    accelerator, measured = held_out(data, model, tmp_path)
    batch = Batch(**measured.clips[0])
    other = measured.with_caption_of_another(0, batch)
    assert {"image_tokens", "pixels"} <= set(batch.image)
    assert torch.equal(other.text, batch.text) and not torch.equal(other.motion_tokens, batch.motion_tokens)
    accelerator.init_trackers("microcinema")
    measured(accelerator, model, 1)
    accelerator.trackers[0].finish()
    assert logged(tmp_path, "validation/loss")[1] > 0


def test_others_replace_broken_clips(tmp_path: Path):
    def read(index: int) -> None:
        if index == 3:
            raise UserError("cut short")

    quarantine = Quarantine(tmp_path / "quarantine", retries=0)
    _, measured = held_out(LatentClips(5, read), pipeline(tmp_path), tmp_path, 5, quarantine)
    assert len(measured.clips) == 5
    assert [record["index"] for record in read_quarantine(tmp_path / "quarantine")] == [3]
    with pytest.raises(UserError, match="held-out clips: cut short"):
        held_out(LatentClips(5, read), pipeline(tmp_path), tmp_path, 5)


# Runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.base_folder(folder / "base")
    write_dataset(folder / "data", num_videos=4, seed=0)
    write_dataset(folder / "held_out", num_videos=5, split="heldout")
    return folder


def arguments(world: Path, run: Path, *more: str) -> list[str]:
    held_out = f"validation_data={{root: {world / 'held_out'}, metadata: {world / 'held_out/clips.csv'}}}"
    small = [f"resolution={tiny.SIZE}", "num_frames=4", "max_train_steps=4", "lr_warmup_steps=0", "learning_rate=1e-2"]
    small += ["model=plain", "data.clip_position=random", "dataloader_num_workers=0", "ema_decay=0.5"]
    places = [
        f"base.pretrained_model_name_or_path={world / 'base'}",
        f"data.root={world / 'data'}",
        f"output_dir={run}",
    ]
    return ["train", *places, held_out, *small, "validation_steps=2", "train_batch_size=1", *more]


def found_at(run: Path, step: int) -> dict[str, float]:
    return {name: logged(run, f"validation/{name}")[step] for name in NAMES}


def call(*arguments: str) -> int:
    tiny_training.reset_accelerator()
    return cli.main(list(arguments))


def test_a_run_logs_the_loss_of_its_averaged_weights_and_resumes_with_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert call(*arguments(world, tmp_path / "whole", "checkpointing_steps=2")) == 0
    before, whole = (found_at(tmp_path / "whole", step) for step in (2, 4))
    assert all(before[name] != whole[name] for name in NAMES)
    times = [whole[f"loss/t={t}"] for t in TIMES]
    assert np.mean(times) == pytest.approx(whole["loss"]) and np.std(times) > 0.01

    save = Checkpoints.save

    def save_and_break_off(self: Checkpoints, progress: Any) -> None:
        save(self, progress)
        raise KeyboardInterrupt

    parts = arguments(world, tmp_path / "parts", "checkpointing_steps=2", "resume_from_checkpoint=latest")
    with monkeypatch.context() as context:  # between a checkpoint and its measurement, twice
        context.setattr(Checkpoints, "save", save_and_break_off)
        assert [call(*parts), call(*parts)] == [130, 130]
    assert call(*parts) == 0
    assert (found_at(tmp_path / "parts", 2), found_at(tmp_path / "parts", 4)) == (before, whole)

    saved = load_pipeline(tmp_path / "whole")
    data = ClipDataset(
        world / "held_out/clips.csv", world / "held_out", 4, 8.0, tiny.SIZE, clip_position="random", seed=SEED
    )
    accelerator, measured = held_out(data, saved, tmp_path / "again", count=64)
    accelerator.init_trackers("microcinema")
    measured(accelerator, saved, 4)
    accelerator.trackers[0].finish()
    assert found_at(tmp_path / "again", 4) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_two_processes_find_what_one_does(world: Path, tmp_path: Path):
    """Bit for bit: the weights stay, at a learning rate that float32 does not see."""
    settings = ["max_train_steps=1", "learning_rate=1e-30"]
    assert call(*arguments(world, tmp_path / "one", *settings, "train_batch_size=2", "seed=3")) == 0
    server = Processes(tmp_path)
    try:
        ended = server.run(arguments(world, tmp_path / "two", *settings), processes=2)
    finally:
        server.close()
    assert [process.status for process in ended] == [0, 0], ended
    assert found_at(tmp_path / "one", 1) == found_at(tmp_path / "two", 1)


def test_bad_held_out_data_end_in_one_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for more, said in (
        ("validation_data={metadata: nowhere.csv}", "nowhere.csv"),
        ("validation_data={metadatum: a.csv}", "no argument 'metadatum'"),
        ("validation_data=a.csv", "validation_data is 'a.csv'"),
    ):
        given = [more if word.startswith("validation_data") else word for word in arguments(world, tmp_path / "run")]
        assert call(*given) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert said in told[-1] and told[-1].startswith("error: "), told
