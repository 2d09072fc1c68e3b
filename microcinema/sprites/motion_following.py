"""Whether a video model follows its motion caption: key frame and descriptive caption stay, the motion caption alone changes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from microcinema.diffusion.rng import generator
from microcinema.evaluation.statistics import proportion
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.sprites import scene
from microcinema.sprites.tracking import judge_motion
from microcinema.utils.errors import UserError

_WORLD_SEED = 240810119  # never a training seed
_SPREAD = 3.0  # scene units from the middle, from where every motion has room
Maker = Callable[[Sequence[scene.Sprite], np.ndarray], np.ndarray]
"""Makes a clip of every sprite, uint8 (n, f, h, w, 3), all from one key frame, uint8 (h, w, 3)."""


def scenes(count: int) -> list[list[scene.Sprite]]:
    """For each of `count` key frames, the same object at the same place in every motion that it can have."""
    found = []
    for index in range(count):
        sprite = scene.sample_attributes(_WORLD_SEED, index)
        rng = np.random.default_rng([_WORLD_SEED, index])
        x, y = scene.WORLD / 2 + rng.uniform(-_SPREAD, _SPREAD, 2)
        motions = [m for m in scene.MOTIONS if not (sprite.shape == "circle" and m in scene.ROTATIONS)]
        found.append(
            [
                replace(
                    sprite,
                    motion=motion,
                    speed="" if motion == "still" else str(rng.choice(scene.SPEEDS)),
                    x=float(x),
                    y=float(y),
                )
                for motion in motions
            ]
        )
    return found


def pipeline_maker(
    pipeline: ImageToVideoPipeline, num_inference_steps: int, guidance_scale: float, seed: int = 0
) -> Maker:
    """Clips of a video model. All clips of a key frame start from the same noise, so that they differ by what they are told alone."""

    def make(shown: Sequence[scene.Sprite], keyframe: np.ndarray) -> np.ndarray:
        motions = [scene.describe_motion(sprite) for sprite in shown]
        apart = pipeline.uses_motion_caption
        captions = [(scene.describe if apart else scene.combined_caption)(sprite) for sprite in shown]
        output = pipeline(
            captions,
            keyframe,
            motions if apart else None,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[generator(seed) for _ in shown],
            output_type="np",
        )
        return np.rint(np.clip(output.frames, 0, 1) * 255).astype(np.uint8)

    return make


def real(shown: Sequence[scene.Sprite], keyframe: np.ndarray) -> np.ndarray:
    """Clips as a perfect model would make them: the judge's own accuracy."""
    return np.stack([scene.render(sprite, size=len(keyframe)).frames for sprite in shown])


def measure(make: Maker, shown: Sequence[Sequence[scene.Sprite]], size: int, fps: float) -> dict[str, Any]:
    """The share of clips that move as their motion caption says.

    Args:
        shown: from `scenes`.
        size: of the key frames, pixels.
        fps: of the clips.

    Returns:
        `motion`: value, interval and number of clips, as in `statistics.proportion`; `speed`: the same of the clips that move as asked;
        `confusion`: for each motion that was asked for, how often the judge saw which.

    Raises:
        UserError: nothing to show.
    """
    if not shown:
        raise UserError("there is no key frame to measure motions with; ask for at least one")
    motions, speeds = [], []
    confusion: dict[str, Counter[str]] = {}
    for variants in tqdm(shown, desc="motion captions", unit="key frame"):
        for sprite, clip in zip(variants, make(variants, scene.render(variants[0], 1, size).frames[0]), strict=True):
            seen = judge_motion(clip, fps)
            confusion.setdefault(sprite.motion, Counter())[seen.name] += 1
            motions.append(seen.name == sprite.motion)
            if motions[-1] and sprite.speed:
                speeds.append(seen.speed == sprite.speed)
    return {
        "motion": proportion(motions),
        "speed": proportion(speeds) if speeds else None,
        "confusion": {motion: dict(counts) for motion, counts in confusion.items()},
    }
