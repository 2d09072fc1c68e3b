"""How much a video network makes of the motion caption: its loss in moving places with the opposite motion in the caption."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, cycle, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from tqdm import tqdm

from benchmarks.flow_error import training_item
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.sprites import scene
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.training.heldout_loss import figures, measure_clip
from microcinema.training.loss import Denoiser, LossConfig

_WORLD_SEED = 231118829  # never a training seed
_PAIRS = (("left", "right"), ("up", "down"), ("clockwise", "counterclockwise"), ("growing", "shrinking"))
OPPOSITE = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}


def moving_sprites(number: int) -> list[scene.Sprite]:
    """Held-out sprites whose motion has an opposite, one of each motion in turn."""

    def having(motion: str) -> Iterator[scene.Sprite]:
        drawn = (scene.sample_attributes(_WORLD_SEED, index, "heldout") for index in count())
        return (sprite for sprite in drawn if sprite.motion == motion)

    sprites = {motion: having(motion) for motion in OPPOSITE}
    return [next(sprites[motion]) for motion in islice(cycle(OPPOSITE), number)]


def loss_config(pipeline: ImageToVideoPipeline) -> LossConfig:
    """What a pipeline predicts from what noise; nothing else of it counts for `measure_clip`."""
    return LossConfig(
        scheduler=pipeline.training_scheduler,
        prior=pipeline.noise_prior,
        keyframe_position=pipeline.keyframe_position,
        remapped_timesteps=pipeline.remapped_timesteps,
        snr_gamma=None,
        motion_weight=0.0,
        timestep_logit_normal=None,
        flow_weight=0.0,
        text_dropout=0.0,
        image_dropout=0.0,
        seed=0,
        keyframe_places=float(pipeline.unet.options.keyframe_places),
    )


@torch.no_grad()
def measure(pipeline: ImageToVideoPipeline, denoiser: Denoiser, sprites: Sequence[scene.Sprite]) -> dict[str, Any]:
    """`loss`, `moving_loss` and `text_sensitivity` (training/heldout_loss.py) over all clips, and the last two for each diffusion time
    (`t=<t>`) and each motion.

    Args:
        sprites: from `moving_sprites`.
    """
    encode, config = BatchEncoder(pipeline, pipeline.unet.device), loss_config(pipeline)
    frames, size, fps = (pipeline.config[name] for name in ("num_frames", "height", "fps"))
    errors = []
    for number, sprite in enumerate(tqdm(sprites, desc="text sensitivity", unit="clip")):
        rendered = scene.render(sprite, frames, size, fps)
        batch = encode(default_collate([training_item(sprite, rendered, fps, number)]))
        opposite = replace(sprite, motion=OPPOSITE[sprite.motion])
        items = default_collate([training_item(opposite, rendered, fps, number)])
        other = replace(batch, text=encode.text(items), motion_tokens=encode.motion_tokens(items))
        errors.append(measure_clip(denoiser, batch, other, config))
    found = np.stack(errors)
    motions = np.array([sprite.motion for sprite in sprites])
    groups = {f"t={t:.0f}": found[:, [level]] for level, t in enumerate(found[0, :, 0])}
    groups |= {motion: found[motions == motion] for motion in OPPOSITE if motion in motions}
    parts = {name: figures(group) for name, group in groups.items()}
    kept = ("moving_loss", "text_sensitivity")
    return figures(found) | {"parts": {name: {key: part[key] for key in kept} for name, part in parts.items()}}
