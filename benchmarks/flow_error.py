"""End-point error of a trained PredictNet on clips of Moving Sprites."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate
from tqdm import tqdm

from microcinema.data.keyframe_index import keyframe_index
from microcinema.data.optical_flow import exact, to_latent_grid
from microcinema.diffusion.losses import add_noise
from microcinema.diffusion.rng import generator
from microcinema.models.predict_net import PredictNet
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.sprites import scene
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.training.loss import TrainableModel


def training_item(sprite: scene.Sprite, rendered: scene.Rendered, fps: float, number: int) -> dict[str, Any]:
    """What training reads of a clip, as an item of a data set."""
    return {
        "video": torch.from_numpy(rendered.frames).permute(0, 3, 1, 2),
        "caption": scene.combined_caption(sprite),
        "description": scene.caption(sprite),
        "motion": scene.motion_caption(sprite),
        "fps": fps,
        "sample_index": number,
    }


@torch.no_grad()
def flow_error(
    pipeline: ImageToVideoPipeline, predict_net: PredictNet, sprites: Sequence[scene.Sprite], t: int
) -> dict[str, float]:
    """Mean end-point errors, in places of the latent grid per frame: `predict_net`, and `zero` of predicting that nothing moves.

    The pipeline has the weights that PredictNet was trained beside; t is a low training step, since noise hides the motion.
    """
    config, times = pipeline.config, pipeline.remapped_timesteps
    frames, size, fps = config["num_frames"], config["height"], config["fps"]
    denoiser = TrainableModel(pipeline.unet, predict_net).eval()
    encode = BatchEncoder(pipeline, pipeline.unet.device)
    step = torch.tensor([t], device=pipeline.unet.device)
    errors: dict[str, list[float]] = {"predict_net": [], "zero": []}
    for number, sprite in enumerate(tqdm(sprites, desc="flow error", unit="clip")):
        rendered = scene.render(sprite, frames, size, fps)
        batch = encode(default_collate([training_item(sprite, rendered, fps, number)]))
        z_ref = batch.latents[:, keyframe_index(pipeline.keyframe_position, frames)]
        eps = torch.randn(batch.latents.shape, generator=generator(0, number)).to(batch.latents.device)
        z_t = add_noise(pipeline.training_scheduler, batch.latents, pipeline.noise_prior.noise(eps, z_ref), step)
        image = dict(batch.image) | ({} if batch.motion_tokens is None else {"motion_tokens": batch.motion_tokens})
        t_model = step if times is None else times.to(step.device)[step]
        text_mask = torch.ones(1, dtype=torch.bool, device=step.device)
        _, flow = denoiser(z_t, t_model, batch.text, z_ref, batch.fps, text_mask, **image)
        assert flow is not None
        truth = to_latent_grid(exact(rendered.flow), pipeline.vae_scale_factor).vectors
        errors["predict_net"].append((flow[0].cpu() - truth).norm(dim=1).mean().item())
        errors["zero"].append(truth.norm(dim=1).mean().item())
    return {name: sum(values) / len(values) for name, values in errors.items()}
