"""Upscales held-out clips of Moving Sprites from 64 to 128 pixels, with one noise for all frames and with one for each.

The upscaler is a tiny `StableDiffusionUpscalePipeline` that is trained here first, in some minutes of one core, unless a folder has
one. The truth is the same clip, rendered at 128 pixels. PSNR is of a clip's pixels; flicker is the mean absolute error, in 8-bit levels, of the
change from each frame to the next, so motion that is right costs nothing.
"""

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline, UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks.reporting import make_parser
from microcinema.config.sampling import UpscaleSettings
from microcinema.data.clip_reader import resize
from microcinema.data.keyframe_index import keyframe_index
from microcinema.diffusion.rng import generator
from microcinema.pipelines.loading import ASSETS
from microcinema.pipelines.upscale import VideoUpscaler
from microcinema.sprites import scene
from microcinema.utils.files import write_json

SIZE, SCALE, CROP, BATCH = 64, 2, 16, 16
CLIPS, FRAMES = 100, 2  # of training
MAX_NOISE = 100  # of the small pictures in training; 20 is the pipeline's default in sampling
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def render_pairs(clips: int) -> tuple[Tensor, Tensor, list[str]]:
    """Frames `n 3 h w` in [-1, 1] of training clips at 64 and at 128 pixels, and their captions."""
    small, large, captions = [], [], []
    for index in range(clips):
        sprite = scene.sample_attributes(0, index)
        for size, frames in ((SIZE, small), (SCALE * SIZE, large)):
            frames.append(scene.render(sprite, FRAMES, size, fps=1.0).frames)
        captions += [scene.caption(sprite)] * FRAMES
    pixels = (rearrange(np.concatenate(frames), "n h w c -> n c h w") for frames in (small, large))
    one, two = (torch.from_numpy(x.copy()).float() / 127.5 - 1 for x in pixels)
    return one, two, captions


def crops(small: Tensor, large: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of crops at the same places of small and large frames, and the numbers of the frames."""
    rng = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), "training", unit="step"):
        indices = torch.randint(len(small), (BATCH,), generator=rng)
        y, x = torch.randint(SIZE - CROP + 1, (2,), generator=rng).tolist()
        big = slice(SCALE * y, SCALE * (y + CROP)), slice(SCALE * x, SCALE * (x + CROP))
        yield small[indices][..., y : y + CROP, x : x + CROP], large[indices][(..., *big)], indices


def train_vae(small: Tensor, large: Tensor, steps: int) -> AutoencoderKL:
    """Two pixels per latent position in each direction; its latents are scaled to unit deviation."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _, pixels, _ in crops(small, large, steps):
        posterior = vae.encode(pixels).latent_dist
        error = functional.l1_loss(vae.decode(posterior.sample()).sample, pixels)
        (error + 1e-6 * posterior.kl().mean()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        deviation = vae.encode(large[:32]).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=1 / deviation.item())
    return vae.eval().requires_grad_(False)


def train_unet(vae: AutoencoderKL, text: Tensor, small: Tensor, large: Tensor, steps: int) -> UNet2DConditionModel:
    """The denoiser of the large frames' latents beside the small frames, which are noisy by a level that it is told, as in the x4 upscaler."""
    unet = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=7,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text.shape[-1],
        attention_head_dim=4,
        norm_num_groups=8,
        num_class_embeds=1000,
    )
    noising, rng = DDPMScheduler(**BETAS, prediction_type="v_prediction"), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for low, pixels, indices in crops(small, large, steps):
        z0 = vae.encode(pixels).latent_dist.mean * vae.config["scaling_factor"]
        eps, low_eps = torch.randn(z0.shape, generator=rng), torch.randn(low.shape, generator=rng)
        t = torch.randint(1000, (BATCH,), generator=rng)
        level = torch.randint(MAX_NOISE, (BATCH,), generator=rng)
        inputs = torch.cat([noising.add_noise(z0, eps, t), noising.add_noise(low, low_eps, level)], dim=1)
        prediction = unet(inputs, t, text[indices], class_labels=level).sample
        functional.mse_loss(prediction, noising.get_velocity(z0, eps, t)).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return unet.eval()


def train(folder: Path, vae_steps: int, unet_steps: int) -> None:
    """Trains the upscaler, whose text encoder is that of the embedded base, and writes it as a diffusers folder."""
    torch.manual_seed(0)
    small, large, captions = render_pairs(CLIPS)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "sprites-base" / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(ASSETS / "sprites-base" / "text_encoder").float()
    vae = train_vae(small, large, vae_steps)
    with torch.no_grad():
        tokens = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        text = encoder(tokens.input_ids)[0]
    parts: dict[str, Any] = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer}
    parts |= {"unet": train_unet(vae, text, small, large, unet_steps), "low_res_scheduler": DDPMScheduler(**BETAS)}
    sampler = DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    StableDiffusionUpscalePipeline(**parts, scheduler=sampler).save_pretrained(folder)


def figures(frames: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """PSNR of the clip `f h w 3`, and flicker."""
    error = frames.astype(np.float64) - truth
    return float(10 * np.log10(255**2 / np.square(error).mean())), float(np.abs(np.diff(error, axis=0)).mean())


def measure(folder: Path, clips: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """The figures of every clip, by the way it was made larger."""
    upscaler = VideoUpscaler.from_pretrained(
        UpscaleSettings(str(folder), num_inference_steps=steps, guidance_scale=1.0, chunk_size=4)
    )
    upscaler.pipeline.set_progress_bar_config(disable=True)
    rows: dict[str, list[tuple[float, float]]] = {}
    for index in tqdm(range(clips), "measuring", unit="clip"):
        sprite = scene.sample_attributes(0, index, "heldout")
        small, truth = (scene.render(sprite, size=size).frames for size in (SIZE, SCALE * SIZE))
        text, noises = scene.caption(sprite), (generator(0, index, frame) for frame in count())
        videos = {
            "bicubic": _bicubic(small),
            "noise of its own for each frame": upscaler(small, text, partial(next, noises)),
            "one noise": upscaler(small, text, partial(generator, 0, index)),
        }
        place = keyframe_index("center", len(small))
        videos["one noise, full-size key frame"] = videos["one noise"].copy()
        videos["one noise, full-size key frame"][place] = truth[place]
        for name, frames in videos.items():
            rows.setdefault(name, []).append(figures(frames, truth))
    return rows


def _bicubic(frames: np.ndarray) -> np.ndarray:
    large = resize(torch.from_numpy(rearrange(frames, "f h w c -> f c h w").copy()), (SCALE * SIZE, SCALE * SIZE))
    return rearrange(large.numpy(), "f c h w -> f h w c")


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, prints a table with standard errors over clips."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--upscaler", type=Path, default=Path("runs/upscaler"), help="its folder, trained if it is not there"
    )
    parser.add_argument(
        "--train-steps", type=int, nargs=2, default=(400, 1500), help="of the autoencoder, of the denoiser"
    )
    parser.add_argument("--clips", type=int, default=8, help="held-out clips")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    arguments = parser.parse_args(argv)
    if not arguments.upscaler.is_dir():
        train(arguments.upscaler, *arguments.train_steps)
    rows = measure(arguments.upscaler, arguments.clips, arguments.steps)
    print("| | PSNR (dB) | flicker (levels) |\n| --- | ---: | ---: |")
    for name, values in rows.items():
        table = np.asarray(values)
        errors = table.std(axis=0, ddof=1) / len(table) ** 0.5 if len(table) > 1 else np.zeros(2)
        cells = [f"{mean:.2f} +- {error:.2f}" for mean, error in zip(table.mean(axis=0), errors, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
