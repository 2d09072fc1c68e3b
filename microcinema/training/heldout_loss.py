"""The loss of held-out clips at fixed noise and diffusion times: two runs, or two steps of one, differ by their networks alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from microcinema.data.indexed import IndexedDataset
from microcinema.diffusion.losses import motion_weights, squared_error
from microcinema.diffusion.rng import generator
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training import loss
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.training.distributed import raise_on_all_ranks
from microcinema.utils.errors import UserError
from microcinema.utils.provenance import append_record

RECORD = "validation/held_out_loss.json"  # in the folder of the run: `step` and the figures of each measurement
LEVELS = 5
SEED = 0  # of clips and noise, whatever the seed of the run, so that runs of several seeds are measured alike


@torch.no_grad()
def measure_clip(denoiser: loss.Denoiser, batch: loss.Batch, other: loss.Batch, config: loss.LossConfig) -> np.ndarray:
    """Squared errors of a clip, and of the same with another caption, at `LEVELS` diffusion times, the middles of equal parts of the schedule.

    The clip's index determines its noise, drawn anew at each time. No condition is dropped. Returns, (l, 5), the diffusion time; the mean
    squared error of the target; the same weighted by how far a place departs from its key frame, from 0 to 1 (`motion_weights`); that of
    `other`; the mean weight.
    """
    rows, kept = [], torch.ones(1, dtype=torch.bool)
    weights = motion_weights(batch.latents, config.keyframes(batch.latents), 1.0) - 1
    for level in range(LEVELS):
        t = torch.tensor([(2 * level + 1) * config.scheduler.config["num_train_timesteps"] // (2 * LEVELS)])
        eps = torch.randn(batch.latents.shape, generator=generator(SEED, batch.indices[0], level))
        noise = loss.TrainingNoise(eps, t, kept, kept).to(batch.latents.device)
        errors = []
        for clip in (batch, other):
            null = loss.NullConditioning(clip.text, clip.motion_tokens)
            prediction, expected, _ = loss.predict(denoiser, clip, noise, null, config)
            errors += [squared_error(prediction, expected, places) for places in (1.0, weights)]
        rows.append(torch.cat([noise.t, errors[0], errors[1], errors[3], weights.mean()[None]]))
    return torch.stack(rows).double().cpu().numpy()


def figures(errors: np.ndarray) -> dict[str, float]:
    """The figures of `HeldOutLoss` from `measure_clip` of every clip, (n, l, 5); the last two only if anything moves."""
    levels = {f"loss/t={t:.0f}": value for t, value in errors[..., :2].mean(axis=0).tolist()}
    _, mean, moving, other, weight = errors.mean(axis=(0, 1)).tolist()
    sensitivity = (other - moving) / max(moving, 1e-12)
    return {
        "loss": mean,
        **levels,
        **({"moving_loss": moving / weight, "text_sensitivity": sensitivity} if weight else {}),
    }


class HeldOutLoss:
    """Measures a network on clips that it is not trained on; logs `validation/<figure>`, and appends them to a file.

    `loss`, `loss/t=<t>`: squared error of the target, mean over the diffusion times and at each. `moving_loss`: the same, weighted by how far
    a place departs from its key frame. `text_sensitivity`: its relative increase by the caption (of the motion, where the model reads one)
    of another clip. Every forward is one clip at one time, so neither batch size nor number of processes changes a bit.

    Args:
        accelerator: each process reads and encodes a share of the clips, here and once, and keeps them on the CPU.
        clips: the first `count` samples of this order, at most one epoch; a UserError if one, or what replaces it, cannot be read.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        encode: BatchEncoder,
        config: loss.LossConfig,
        clips: IndexedDataset,
        count: int,
        output_dir: Path,
    ) -> None:
        self.encode, self.config, self.clips, self.output_dir, captions = encode, config, {}, output_dir, []
        self.caption = "motion" if encode.pipeline.uses_motion_caption else "caption"
        share = range(accelerator.process_index, min(count, clips.order.length), accelerator.num_processes)
        with raise_on_all_ranks("held-out clips: {reason}", (UserError,)), accelerator.autocast():
            for i in tqdm(share, "held-out clips", disable=not accelerator.is_main_process):
                items = default_collate([clips[i]])
                captions.append((i, items[self.caption][0]))
                self.clips[i] = send_to_device(vars(encode(items)), "cpu")
        self.captions = [caption for _, caption in sorted(gather_object(captions))]

    def __call__(self, accelerator: Accelerator, pipeline: ImageToVideoPipeline, step: int) -> None:
        """Measures the networks of a pipeline, complete on every process. Collective."""
        denoiser, errors = loss.TrainableModel(pipeline.unet), []
        for i in tqdm(self.clips, "held-out loss", leave=False, disable=not accelerator.is_main_process):
            batch = loss.Batch(**send_to_device(self.clips[i], accelerator.device))
            with accelerator.autocast():
                errors.append((i, measure_clip(denoiser, batch, self.with_caption_of_another(i, batch), self.config)))
        ordered = [error for _, error in sorted(gather_object(errors), key=lambda entry: entry[0])]
        found = figures(np.stack(ordered))
        accelerator.log({f"validation/{name}": value for name, value in found.items()}, step)
        if accelerator.is_main_process:
            append_record(self.output_dir / RECORD, {"step": step, **found})

    def with_caption_of_another(self, i: int, batch: loss.Batch) -> loss.Batch:
        """Clip i with the next caption that differs from its own."""
        following = self.captions[i:] + self.captions[:i]
        wrong = {self.caption: [next((caption for caption in following if caption != following[0]), following[0])]}
        if self.caption == "motion":
            return replace(batch, motion_tokens=self.encode.motion_tokens(wrong))
        return replace(batch, text=self.encode.text(wrong))
