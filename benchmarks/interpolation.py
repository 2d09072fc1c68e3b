"""Frames between key frames: how near a model's are to the real ones, beside frames that are repeated or blended from their neighbors."""

from collections.abc import Callable, Mapping, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from microcinema.diffusion.rng import generator
from microcinema.evaluation.video_metrics import psnr
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.sample_folder import to_uint8
from microcinema.sprites import scene
from microcinema.utils.errors import UserError

_WORLD_SEED = 240611012  # never a training seed
_MOVED = 8  # gray levels by which a pixel differs from a key frame, so that it counts as moving
Maker = Callable[[scene.Sprite, np.ndarray, Sequence[int]], np.ndarray]
"""Makes a clip of a sprite, uint8 (f, h, w, 3), from the real one, of which it may see the frames at these places."""


def moving_sprites(number: int) -> list[scene.Sprite]:
    """The first sprites of this measurement's world that are held out of training and move."""
    sprites = (scene.sample_attributes(_WORLD_SEED, index, "heldout") for index in count())
    return list(islice((sprite for sprite in sprites if sprite.motion != "still"), number))


def places_of(frames: int, factor: int) -> dict[str, list[int]]:
    """What is measured in clips of at most so many frames: the last place ends the clip."""
    if not 2 <= factor < frames:
        raise UserError(f"factor is {factor}, and the model's clips have {frames} frames; use 2 or more, and fewer")
    every = [*range(0, frames, factor)]
    return {f"every {factor} frames": every, "first and last": [0, frames - 1]}


def reconstruct(pipeline: ImageToVideoPipeline, frames: np.ndarray) -> np.ndarray:
    """Frames as the VAE decodes them, uint8 (f, h, w, 3): the best that a model which decodes by it can do."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        decoded = pipeline.decode_latents(pipeline.encode_image(pixels)[None])[0].float().cpu()
    return to_uint8((decoded.permute(0, 2, 3, 1) / 2 + 0.5).numpy())


def from_neighbors(keyframes: np.ndarray, places: Sequence[int], blend: bool) -> np.ndarray:
    """A clip whose frames are the nearest key frame (the earlier of two), or between two their mean, weighted by nearness."""
    frames = []
    for frame in range(places[-1] + 1):
        after = next(i for i, place in enumerate(places) if place >= frame)
        before = after if places[after] == frame else after - 1
        share = (frame - places[before]) / max(1, places[after] - places[before])
        share = share if blend else float(share > 0.5)
        frames.append((1 - share) * keyframes[before].astype(float) + share * keyframes[after])
    return np.rint(frames).astype(np.uint8)


def makers(pipeline: ImageToVideoPipeline, fps: float, seed: int = 0, **settings: Any) -> dict[str, Maker]:
    """`model`; `repeat` and `blend`, of key frames as the VAE decodes them, like all frames of a video; and `vae`, the real frames alike."""

    def model(sprite: scene.Sprite, real: np.ndarray, places: Sequence[int]) -> np.ndarray:
        texts: dict[str, Any] = {"prompt": scene.combined_caption(sprite)}
        if pipeline.uses_motion_caption:
            texts = {"prompt": scene.caption(sprite), "motion_prompt": scene.motion_caption(sprite)}
        clip = {"keyframes": {place: real[place] for place in places}, "num_frames": len(real), "fps": fps}
        output = pipeline(**texts, **clip, **settings, generator=[generator(seed)], output_type="np")
        return to_uint8(output.frames[0])

    def neighbors(blend: bool) -> Maker:
        return lambda _, real, places: from_neighbors(reconstruct(pipeline, real[list(places)]), places, blend)

    real: Maker = lambda _, real, places: reconstruct(pipeline, real)  # noqa: E731
    return {"model": model, "repeat": neighbors(False), "blend": neighbors(True), "vae": real}


def measure(
    makers: Mapping[str, Maker], sprites: Sequence[scene.Sprite], places: Sequence[int], size: int, fps: float
) -> dict[str, dict[str, float]]:
    """Means over clips of `places[-1] + 1` frames at `size` pixels: PSNR (dB) of the frames that are no key frames, `psnr`, and in pixels that
    differ from either neighboring key frame, `moving_psnr`.

    Raises:
        UserError: no sprites.
    """
    if not sprites:
        raise UserError("no sprites to interpolate; use at least one")
    inner = [frame for frame in range(places[-1] + 1) if frame not in places]
    values: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    for sprite in tqdm(sprites, desc="interpolation", unit="clip"):
        real = scene.render(sprite, places[-1] + 1, size, fps).frames
        before, after = (
            np.stack([real[max(p for p in places if p < frame)] for frame in inner]),
            np.stack([real[min(p for p in places if p > frame)] for frame in inner]),
        )
        changes = [np.abs(real[inner].astype(int) - neighbor).max(-1) > _MOVED for neighbor in (before, after)]
        moving = changes[0] | changes[1]
        for name, make in makers.items():
            made = make(sprite, real, places)
            in_moving = psnr(made[inner][moving], real[inner][moving]) if moving.any() else np.nan
            values[name].append((psnr(made[inner], real[inner]), in_moving))
    means = {name: np.nanmean(rows, axis=0).tolist() for name, rows in values.items()}
    return {name: {"psnr": whole, "moving_psnr": part} for name, (whole, part) in means.items()}
