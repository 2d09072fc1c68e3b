"""Drift of long videos from their key frame: clips that continue one another, and windows over one latent."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from microcinema.data.keyframe_index import keyframe_index
from microcinema.diffusion.rng import generator
from microcinema.evaluation.video_metrics import psnr
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.long_video import Windows
from microcinema.pipelines.sample_folder import to_uint8
from microcinema.sprites import scene
from microcinema.sprites.judge import SpriteJudge
from microcinema.sprites.tracking import segment
from microcinema.utils.errors import UserError

MOTIONS = ("still", "clockwise", "counterclockwise", "bouncing")
"""Those that stay in view however long they go on."""

_WORLD_SEED = 231118830  # never a training seed
_MARGIN = 5.0  # scene units round an object that are not counted as background: its shadow falls there
Maker = Callable[[scene.Sprite, np.ndarray], np.ndarray]
"""Makes a video of a sprite, uint8 (f, h, w, 3), from its key frame, uint8 (h, w, 3)."""


def lasting_sprites(count: int) -> list[scene.Sprite]:
    """The first `count` sprites of this measurement's world whose motion stays in view."""
    sprites = (scene.sample_attributes(_WORLD_SEED, index) for index in itertools.count())
    return list(itertools.islice((sprite for sprite in sprites if sprite.motion in MOTIONS), count))


def makers(
    pipeline: ImageToVideoPipeline,
    num_segments: int,
    num_inference_steps: int,
    guidance_scale: float,
    window_overlap: int | None = None,
    seed: int = 0,
) -> dict[str, Maker]:
    """`real`, as a perfect model would make them; `continuation` of so many clips, by a model whose key frame is the first frame of a clip;
    `windows`, at once and of the same length."""
    fps, windows = pipeline.config["fps"], windows_of(pipeline, num_segments, window_overlap)
    frames = windows.frames
    sample = partial(pipeline, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, output_type="np")

    def made(**length: Any) -> Maker:
        def make(sprite: scene.Sprite, keyframe: np.ndarray) -> np.ndarray:
            texts: dict[str, Any] = {"prompt": scene.combined_caption(sprite)}
            if pipeline.uses_motion_caption:
                texts = {"prompt": scene.caption(sprite), "motion_prompt": scene.motion_caption(sprite)}
            output = sample(image=keyframe, generator=[generator(seed)], **texts, **length)
            return to_uint8(output.frames[0])

        return make

    kinds: dict[str, Maker] = {"real": lambda sprite, key: scene.render(sprite, frames, len(key), fps).frames}
    if keyframe_index(pipeline.keyframe_position, windows.length) == 0:
        kinds["continuation"] = made(num_segments=num_segments)
    return {**kinds, "windows": made(num_frames=frames, window_overlap=window_overlap)}


def windows_of(pipeline: ImageToVideoPipeline, num_segments: int, window_overlap: int | None = None) -> Windows:
    """The windows over a video that is as long as so many clips in a row."""
    clip = pipeline.config["num_frames"]
    return Windows(num_segments * (clip - 1) + 1, clip, window_overlap)


def measure(
    makers: Mapping[str, Maker],
    sprites: Sequence[scene.Sprite],
    judge: SpriteJudge,
    size: int,
    index: int = 0,
    fps: float = 8.0,
) -> dict[str, list[dict[str, float]]]:
    """Fidelity of objects and backgrounds, clip by clip, in a video of each sprite by each maker from a key frame of `size` pixels: frame
    `index` of the real video, of `fps` frames a second.

    Consecutive clips share a frame and have as many frames as the judge's.

    Returns:
        for each kind and clip: `object`, the proportion of clips with the right shape, colour and background, and `background_psnr`, the
        mean PSNR of their frames to the key frame, dB.

    Raises:
        UserError: no sprites.
    """
    if not sprites:
        raise UserError("no sprites to measure drift with; use at least one")
    length = judge.classifier.config["num_frames"]
    values: dict[str, list[list[tuple[bool, float]]]] = {kind: [] for kind in makers}
    for sprite in tqdm(sprites, desc="drift", unit="key frame"):
        keyframe = scene.render(sprite, index + 1, size, fps).frames[index]
        for kind, make in makers.items():
            video = make(sprite, keyframe)
            clips = np.stack([video[start : start + length] for start in range(0, len(video) - 1, length - 1)])
            names, _ = judge(clips)
            right = [all(n[key] == getattr(sprite, key) for key in ("shape", "colour", "background")) for n in names]
            values[kind].append([(r, background_psnr(clip, keyframe)) for r, clip in zip(right, clips, strict=True)])
    means = {kind: np.mean(videos, axis=0).tolist() for kind, videos in values.items()}
    return {kind: [{"object": o, "background_psnr": p} for o, p in rows] for kind, rows in means.items()}


def background_psnr(frames: np.ndarray, keyframe: np.ndarray) -> float:
    """Mean PSNR (dB) of frames (f, h, w, 3) to a key frame (h, w, 3), both uint8, where neither shows the object."""
    masks = segment(np.concatenate([keyframe[None], frames])) > 0
    margin = round(_MARGIN * len(keyframe) / scene.WORLD)
    near = ndimage.binary_dilation(masks, np.ones((1, 2 * margin + 1, 2 * margin + 1), bool))
    backgrounds = ~(near[0] | near[1:])
    return float(np.mean([psnr(frame[b], keyframe[b]) for frame, b in zip(frames, backgrounds, strict=True)]))


def text_table(drift: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The figures for a terminal: a line for each kind and measure, a column for each clip."""
    clips = max(len(rows) for rows in drift.values())
    lines = [f"{'clip':<34}" + "".join(f"{clip + 1:>8}" for clip in range(clips))]
    for kind, rows in drift.items():
        lines.append(f"{f'{kind}, object as asked for':<34}" + "".join(f"{row['object']:>8.0%}" for row in rows))
        lines.append(f"{f'{kind}, background, dB':<34}" + "".join(f"{row['background_psnr']:>8.1f}" for row in rows))
    return "\n".join(lines)
