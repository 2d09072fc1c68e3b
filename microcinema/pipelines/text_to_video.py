"""Both stages: a prompt becomes a key frame, the key frame a video (arXiv 2311.18829)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput

from microcinema.config.sampling import PRESETS, KeyframeSettings, SamplingSettings
from microcinema.pipelines.image_to_video import ImageToVideoOutput, ImageToVideoPipeline
from microcinema.pipelines.keyframe import Keyframe, KeyframePipeline, PixelImage, as_pil, check_flagged, make_keyframe
from microcinema.pipelines.keyframe_places import split_keyframes
from microcinema.pipelines.prompts import (
    PromptItem,
    broadcast_to_prompts,
    check_generators,
    check_motion_prompt,
    check_prompts,
)
from microcinema.pipelines.saving import load_keyframe_pipeline, load_pipeline
from microcinema.utils.errors import UserError


@dataclass
class TextToVideoOutput(BaseOutput):
    """Videos and their key frames.

    Attributes:
        frames: as in `ImageToVideoOutput`.
        keyframes: one per video, with its provenance. Without prompts that `on_flagged=skip` left out.
    """

    frames: Any
    keyframes: list[Keyframe]


def keyframe_arguments(
    source: KeyframePipeline,
    item: PromptItem,
    defaults: Mapping[str, Any],
    video: SamplingSettings,
    settings: KeyframeSettings,
) -> dict[str, Any]:
    """Arguments of `KeyframePipeline.__call__` beside prompt and size.

    Steps and guidance that `settings` leaves open are those of the preset, or in `defaults`, the config of the video pipeline, or else of
    `video`, the resolved settings of stage 2; like the negative prompt, they are left out if the pipeline does not take them.
    """
    arguments: dict[str, Any] = {"draw_height": settings.height, "draw_width": settings.width}
    for name in ("num_inference_steps", "guidance_scale"):
        arguments[name] = getattr(settings, name)
        if arguments[name] is None and source.takes(name):
            default = PRESETS[video.preset].get(f"keyframe_{name}", defaults[f"keyframe_{name}"])
            arguments[name] = getattr(video, name) if default is None else default
    if item.negative_prompt and source.takes("negative_prompt"):
        arguments["negative_prompt"] = item.negative_prompt
    return arguments


def make_item_keyframe(
    item: PromptItem, source: KeyframePipeline | None, height: int, width: int, **arguments: Any
) -> Keyframe:
    """The key frame of one video: its image at the size of the video, or one that `source` draws with `arguments`."""
    if isinstance(item.image, np.ndarray):
        return make_keyframe(as_pil(item.image), height, width, {"source": "array"})
    assert source is not None
    return draw_keyframes([item], source, height, width, **arguments)[0]


def draw_keyframes(
    items: Sequence[PromptItem], source: KeyframePipeline, height: int, width: int, **arguments: Any
) -> list[Keyframe]:
    """Key frames of several videos in one call of the text-to-image pipeline, each from its own generator."""
    prompts = [item.keyframe_prompt or item.prompt for item in items]
    generators = [item.generator("keyframe") for item in items]
    with torch.no_grad():
        return source(prompts, height, width, generators, batch_size=len(items), **arguments)


def animate(
    video: ImageToVideoPipeline,
    items: Sequence[PromptItem],
    images: Sequence[PixelImage],
    settings: SamplingSettings,
    **arguments: Any,
) -> ImageToVideoOutput:
    """Videos of items and their key frames in one batch, each from its own generator."""
    negatives = [item.negative_prompt for item in items]
    motions = [item.motion_prompt or item.prompt for item in items]
    return video(
        [item.prompt for item in items],
        list(images),
        motions if any(item.motion_prompt for item in items) else None,
        negative_prompt=negatives[0] if len(set(negatives)) == 1 else negatives,
        generator=[item.generator("video") for item in items],
        **asdict(settings),
        **arguments,
    )


@dataclass
class TextToVideoPipeline:
    """Stage 1, `keyframe`, followed by stage 2, `video`."""

    keyframe: KeyframePipeline
    video: ImageToVideoPipeline

    @classmethod
    def from_pretrained(
        cls, name: str, keyframe_model: str | None = None, torch_dtype: torch.dtype = torch.float32
    ) -> "TextToVideoPipeline":
        """Loads both stages.

        Args:
            name: of the video model: an embedded model, a folder or a hub repository.
            keyframe_model: any text-to-image pipeline of diffusers; None: the base of the video model.

        Raises:
            UserError: one of them cannot be loaded.
        """
        video = load_pipeline(name, torch_dtype=torch_dtype)
        return cls(load_keyframe_pipeline(video, keyframe_model, torch_dtype=torch_dtype), video)

    def to(self, device: torch.device | str) -> "TextToVideoPipeline":
        """Moves both stages."""
        self.keyframe.to(device)
        self.video.to(device)
        return self

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Settings of the bars over denoising steps (tqdm's), of both stages."""
        self.keyframe.set_progress_bar_config(**settings)
        self.video.set_progress_bar_config(**settings)

    def __call__(
        self,
        prompt: str | Sequence[str],
        motion_prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        seed: int = 0,
        num_videos_per_prompt: int = 1,
        sample_index: int = 0,
        batch_size: int = 1,
        output_type: str = "pil",
        keyframe: KeyframeSettings | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        keyframes: Mapping[int, PixelImage | None] | None = None,
        **settings: Any,
    ) -> TextToVideoOutput:
        """Makes videos, each from its own key frame: those that the command `sample` makes of the same prompts and seed.

        Args:
            motion_prompt, negative_prompt: one for all prompts, or one each; see `PromptItem`.
            seed, sample_index: of the random generators; the prompts are samples `sample_index`, `sample_index` + 1, ...
            num_videos_per_prompt, output_type: as in `ImageToVideoPipeline`.
            batch_size: videos made at once; more than one changes them by rounding.
            keyframe: settings of stage 1.
            generator: in the place of a seed: one per video, or one for all, which draws all key frames first.
            return_dict: False: a tuple, of frames and key frames.
            keyframes: images by their places in a clip, None for the key frame that stage 1 draws; None: that one, at the model's own place.
            settings: those of `SamplingSettings`.

        Raises:
            UserError: bad input; it is found before stage 1 starts, unless only the text-to-image pipeline can tell.
        """
        asked = SamplingSettings.of(settings)
        if num_videos_per_prompt < 1 or batch_size < 1:
            raise UserError(f"{num_videos_per_prompt=}, {batch_size=}; both must be >= 1")
        if generator is not None and (seed or sample_index):
            raise UserError(f"{seed=}, {sample_index=} and a generator; give one of the two")
        check_motion_prompt(motion_prompt, self.video.uses_motion_caption)
        texts = check_prompts(prompt), motion_prompt, negative_prompt
        items = _prompt_items(*texts, seed, sample_index, num_videos_per_prompt, generator)
        resolved, stage1 = self.video.resolve(asked), keyframe or KeyframeSettings()
        if keyframes is not None:
            image, keyframes = split_keyframes(keyframes, self.video.main_keyframe(keyframes, resolved))
            items = items if image is None else [replace(item, image=np.asarray(as_pil(image))) for item in items]
        drawn, animated, batches = [], [], []
        assert resolved.height is not None and resolved.width is not None
        for item in items:
            arguments = keyframe_arguments(self.keyframe, item, self.video.config, resolved, stage1)
            image = make_item_keyframe(item, self.keyframe, resolved.height, resolved.width, **arguments)
            if check_flagged(image.provenance, item.prompt, stage1.on_flagged):
                drawn.append(image)
                animated.append(item)
        for start in range(0, len(animated), batch_size):
            batch = slice(start, start + batch_size)
            images, more = [entry.image for entry in drawn[batch]], {"output_type": output_type, "keyframes": keyframes}
            batches.append(animate(self.video, animated[batch], images, resolved, **more).frames)
        join: Any = torch.cat if batches and isinstance(batches[0], torch.Tensor) else np.concatenate
        frames = list(chain(*batches)) if not batches or isinstance(batches[0], list) else join(batches)
        output = TextToVideoOutput(frames, drawn)
        return output if return_dict else output.to_tuple()


def _prompt_items(
    prompts: list[str],
    motion_prompt: Any,
    negative_prompt: Any,
    seed: int,
    sample_index: int,
    videos: int,
    generator: Any,
) -> list[PromptItem]:
    """An item for each of the `videos` of every prompt; see `TextToVideoPipeline.__call__`."""
    motions = broadcast_to_prompts("motion prompts", motion_prompt, len(prompts))
    negatives = broadcast_to_prompts("negative prompts", negative_prompt, len(prompts))
    count = len(prompts) * videos
    rngs = iter([None] * count if generator is None else check_generators(generator, count))
    return [
        PromptItem(text, "", motion, None, negative, seed, sample_index + index, video, rng=next(rngs))
        for index, (text, motion, negative) in enumerate(zip(prompts, motions, negatives, strict=True))
        for video in range(videos)
    ]
