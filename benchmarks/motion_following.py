"""How often a video model follows its motion caption, when only that changes and the key frame stays the same."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from microcinema.diffusion.rng import generator
from microcinema.evaluation.statistics import proportion
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.sample_folder import to_uint8
from microcinema.sprites import scene
from microcinema.sprites.tracking import judge_motion
from microcinema.utils.errors import UserError

_WORLD_SEED = 240810119  # never a training seed
_SPREAD = 3.0  # scene units from the middle, where every motion has room
Maker = Callable[[Sequence[scene.Sprite], np.ndarray], np.ndarray]
"""Makes a clip of every sprite, uint8 (n, f, h, w, 3), all from one key frame, uint8 (h, w, 3)."""


def scenes(count: int) -> list[list[scene.Sprite]]:
    """For each of `count` key frames, the same object at the same position in every motion that it can have."""
    result = []
    for index in range(count):
        sprite = scene.sample_attributes(_WORLD_SEED, index)
        rng = np.random.default_rng([_WORLD_SEED, index])
        x, y = (float(value) for value in scene.WORLD / 2 + rng.uniform(-_SPREAD, _SPREAD, 2))
        motions = [m for m in scene.MOTIONS if not (sprite.shape == "circle" and m in scene.ROTATIONS)]
        speeds = ["" if motion == "still" else str(rng.choice(scene.SPEEDS)) for motion in motions]
        result.append([replace(sprite, motion=m, speed=s, x=x, y=y) for m, s in zip(motions, speeds, strict=True)])
    return result


def pipeline_maker(
    pipeline: ImageToVideoPipeline, num_inference_steps: int, guidance_scale: float, seed: int = 0
) -> Maker:
    """Clips of a video model. All clips of a key frame start from the same noise, so that only their captions differ."""

    sample = partial(pipeline, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, output_type="np")
    has_two = pipeline.uses_motion_caption

    def make(sprites: Sequence[scene.Sprite], keyframe: np.ndarray) -> np.ndarray:
        captions = [(scene.caption if has_two else scene.combined_caption)(sprite) for sprite in sprites]
        motions = [scene.motion_caption(sprite) for sprite in sprites] if has_two else None
        return to_uint8(sample(captions, keyframe, motions, generator=[generator(seed) for _ in sprites]).frames)

    return make


def real(sprites: Sequence[scene.Sprite], keyframe: np.ndarray, index: int = 0, fps: float = 8.0) -> np.ndarray:
    """Real clips, with the key frame as their frame `index`; their result is the accuracy of the judge."""
    size = len(keyframe)
    return np.stack([scene.render(started_earlier(s, index / fps), size=size, fps=fps).frames for s in sprites])


def started_earlier(sprite: scene.Sprite, seconds: float) -> scene.Sprite:
    """The sprite that is, so long after its start, where this one is at its start."""
    x, y, radius, angle = (float(value) for value in scene.poses(sprite, np.array([seconds]))[0])
    x, y, angle = 2 * sprite.x - x, 2 * sprite.y - y, 2 * sprite.angle - angle
    return replace(sprite, x=x, y=y, radius=sprite.radius**2 / radius, angle=angle)


def measure(make: Maker, variants: Sequence[Sequence[scene.Sprite]], size: int, fps: float) -> dict[str, Any]:
    """Proportion of clips that move as their motion caption says, for variants from `scenes` and key frames of `size` pixels.

    Returns:
        `motion`, as in `statistics.proportion`; `speed`, the same among clips with the right motion; `confusion`, for each motion in a
        caption, how often the judge named which.

    Raises:
        UserError: no key frame.
    """
    if not variants:
        raise UserError("no key frames to measure motions with; use at least one")
    motions, speeds = [], []
    confusion: dict[str, Counter[str]] = {}
    for sprites in tqdm(variants, desc="motion captions", unit="key frame"):
        for sprite, clip in zip(sprites, make(sprites, scene.render(sprites[0], 1, size).frames[0]), strict=True):
            judged = judge_motion(clip, fps)
            confusion.setdefault(sprite.motion, Counter())[judged.name] += 1
            motions.append(judged.name == sprite.motion)
            if motions[-1] and sprite.speed:
                speeds.append(judged.speed == sprite.speed)
    return {
        "motion": proportion(motions),
        "speed": proportion(speeds) if speeds else None,
        "confusion": {motion: dict(counts) for motion, counts in confusion.items()},
    }
