"""A tiny video pipeline, tiny latent clips and what a run has logged, for the tests of training. Import as `import tiny_training`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from microcinema import precomputing
from microcinema.data.latents import EncodedClips, Layout
from microcinema.diffusion.schedule import make_sampler, make_scheduler
from microcinema.models.conditioning import ConditionEncoder
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training import trainer
from microcinema.training.settings import Settings

FRAMES = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For networks this small, threads cost more than they save, most of all beside other work. For a module that imports it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pipeline(folder: str | Path, seed: int = 0, **settings: Any) -> ImageToVideoPipeline:
    """A fresh, untrained video model on the tiny base; `folder` takes the tokenizer's files."""
    base = tiny.base_pipeline(folder)
    torch.manual_seed(seed)
    return ImageToVideoPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=VideoUNet.from_unet2d(base.unet, max_frames=8, fusion="add", inject="both"),
        condition_encoder=ConditionEncoder.from_unet2d(base.unet, fusion="add", inject="both"),
        scheduler=make_sampler(make_scheduler(base.scheduler.config)),
        num_frames=FRAMES,
        **settings,
    )


class LatentClips:
    """`length` clips of random latents. `on_read(index)` may raise: how a test breaks a run off."""

    def __init__(self, length: int = 5, on_read: Callable[[int], None] | None = None) -> None:
        self.length = length
        self.on_read = on_read

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.on_read is not None:
            self.on_read(index)
        shape = (FRAMES, tiny.LATENT_CHANNELS, tiny.SIZE // tiny.VAE_FACTOR, tiny.SIZE // tiny.VAE_FACTOR)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        return {"latents": latents, "caption": f"a red star {index % 2}", "fps": 8.0}


class PoisonedClips(LatentClips):
    """One of them, item 3, is not finite."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {**super().__getitem__(index), "id": f"clip-{index}"}
        return {**item, "latents": item["latents"] / 0, "caption": "poison"} if index == 3 else item


SMALL = {
    "max_train_steps": 4,
    "train_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 2,
    "dataloader_num_workers": 0,
}


def accelerator(settings: Settings) -> Accelerator:
    """A fresh one, though accelerate keeps one state for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=False)
    return trainer.make_accelerator(settings)


def train(
    model: ImageToVideoPipeline, dataset: Any, output_dir: str | Path, validate: Any = None, **changes: Any
) -> Path:
    """`trainer.train` with small settings."""
    settings = Settings(str(output_dir), **{**SMALL, **changes})
    return trainer.train(accelerator(settings), model, dataset, settings, validate)


def encode_clips(
    model: ImageToVideoPipeline,
    dataset: Any,
    folder: str | Path,
    flow_teacher: str | None = None,
    keep: Sequence[str] | None = None,
    clips_per_shard: int = 2,
    passes: int = 1,
    **changes: Any,
) -> EncodedClips:
    """`precomputing.encode_clips` with small shards; gives what it wrote."""
    layout = Layout(len(dataset), passes, clips_per_shard)
    settings = {"flow_teacher": flow_teacher, "keep": keep, "layout": layout, "clip_retries": 0, **changes}
    with contextlib.redirect_stdout(None):
        precomputing.encode_clips(accelerator(Settings(str(folder), 1)), model, dataset, Path(folder), **settings)
    return EncodedClips(folder, dataset)


def logged(output_dir: str | Path, name: str = "loss") -> dict[int, float]:
    """Step to value of a scalar in the TensorBoard files of a run; of a step that was done twice, the last."""
    accumulator = EventAccumulator(str(Path(output_dir) / "logs" / "microcinema"))
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars(name)}


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a checkpoint or pipeline, by file and name."""
    from safetensors.torch import load_file

    files = sorted(Path(folder).rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{key}": value for file in files for key, value in load_file(file).items()}
