"""Stage 3: an image upscaler of diffusers makes the frames of videos larger, all of a video from one noise.

With noise of its own every frame would get other details, which flicker; from the same noise equal places get equal ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from microcinema.config.sampling import MemorySettings, ResizeMode, UpscaleSettings
from microcinema.models.vae import vae_scale_factor
from microcinema.pipelines.keyframe import KeyframePipeline, open_pipeline
from microcinema.pipelines.loading import load_index, resolve_model_path
from microcinema.pipelines.memory import apply
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.sample_folder import SampleFolder, to_uint8
from microcinema.pipelines.text_to_video import make_item_keyframe
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.hashing import hash_array, hash_networks

UPSCALERS = ("StableDiffusionUpscalePipeline", "StableDiffusionLatentUpscalePipeline")


def check_upscaler(settings: UpscaleSettings) -> None:
    """Refuses, with a UserError and before its weights are read, a pipeline that is no upscaler, or that does not take a setting."""
    name = str(settings.pretrained_model_name_or_path)
    kind = load_index(resolve_model_path(name), settings.revision).get("_class_name")
    if kind not in UPSCALERS:
        raise UserError(f"upscale: '{name}' is a {kind}; give one of {', '.join(UPSCALERS)}")
    if settings.noise_level is not None and kind != UPSCALERS[0]:
        raise UserError(f"upscale.noise_level={settings.noise_level}, which a {kind} does not take; use null")


class VideoUpscaler:
    """Makes the frames of a video larger, `chunk_size` at a time; the number of frames at once changes them by rounding alone.

    Args:
        pipeline: one of `UPSCALERS`.
        settings: of its calls.

    Attributes:
        scale: pixels per pixel, in each direction.
    """

    def __init__(self, pipeline: DiffusionPipeline, settings: UpscaleSettings):
        self.pipeline, self.settings = pipeline, settings
        is_latent = type(pipeline).__name__ == UPSCALERS[1]
        self.scale: int = 2 if is_latent else vae_scale_factor(pipeline.vae)

    @classmethod
    def from_pretrained(cls, settings: UpscaleSettings, torch_dtype: torch.dtype = torch.float32) -> "VideoUpscaler":
        """Opens the upscaler that the settings name; a UserError if it is none."""
        check_upscaler(settings)
        origin = str(settings.pretrained_model_name_or_path), settings.revision, settings.variant
        pipeline = open_pipeline(
            *origin, torch_dtype, "upscaling", lambda path, _, own: DiffusionPipeline.from_pretrained(path, **own)
        )
        return cls(pipeline, settings)

    def __call__(
        self,
        frames: np.ndarray,
        prompt: str,
        make_generator: Callable[[], torch.Generator],
        negative_prompt: str = "",
    ) -> np.ndarray:
        """The frames `f h w 3`, uint8, with `scale` times as many pixels in each direction.

        Args:
            make_generator: a new generator at the beginning of its stream: every frame draws the same noise from its own.

        Raises:
            UserError: the pipeline refuses the frames' size or a setting, or makes pixels that are not finite.
        """
        values = {key: getattr(self.settings, key) for key in ("num_inference_steps", "guidance_scale", "noise_level")}
        arguments = {key: value for key, value in values.items() if value is not None}
        large = []
        for start in range(0, len(frames), self.settings.chunk_size):
            images = [Image.fromarray(frame) for frame in frames[start : start + self.settings.chunk_size]]
            texts = {"prompt": [prompt] * len(images), "negative_prompt": [negative_prompt] * len(images)}
            generators = [make_generator() for _ in images]
            size = f"{frames.shape[1]}x{frames.shape[2]} with {arguments or 'its own settings'}"
            fault = f"stage 3, {type(self.pipeline).__name__}, cannot upscale {size} ({{reason}})"
            with user_errors(f"{fault}; change upscale.* or the video's size", ValueError, TypeError, RuntimeError):
                output = self.pipeline(image=images, **texts, generator=generators, output_type="np", **arguments)
            large.append(to_uint8(output.images, "the upscaled video"))
        return np.concatenate(large)


def upscale_videos(
    items: Sequence[PromptItem],
    videos: SampleFolder,
    target: SampleFolder,
    upscaler: VideoUpscaler,
    memory: MemorySettings,
    device: torch.device | str,
    resize_mode: ResizeMode = "crop",
    progress: bool = True,
    on_done: Callable[[PromptItem, bool], None] = lambda item, is_new: None,
) -> None:
    """Upscales the videos in a folder, which has their format `frames`, into another one; what is up to date there is kept.

    A key frame that the user gave as a picture of at least the new size takes its frame's place, scaled and cropped as for the video.
    """
    is_ready, hashes = False, hash_networks(upscaler.pipeline.components)
    upscaler.pipeline.set_progress_bar_config(desc="upscaling", unit="step", leave=False, disable=not progress)
    for item in tqdm(items, "upscaled videos", unit="video", disable=not progress or len(items) == 1):
        if (video := videos.record(item)) is None:  # its key frame was flagged
            continue
        frames = videos.load(item.id).frames
        keyframe = _full_size_keyframe(
            item, frames.shape[1] * upscaler.scale, frames.shape[2] * upscaler.scale, resize_mode
        )
        record: Mapping[str, Any] = {
            **{key: video[key] for key in ("id", "prompt", "negative_prompt", "generator", "fps", "keyframe_index")},
            "upscale": {**asdict(upscaler.settings), "class": type(upscaler.pipeline).__name__},
            "weights_sha256": hashes,
            "memory": asdict(memory),
            "video_crf": target.crf,
            "sha256_of_video": hash_array(frames),
            "full_size_keyframe": keyframe and keyframe.provenance,
        }
        if is_new := not target.video_is_up_to_date(item, record):
            if not is_ready:
                apply(upscaler.pipeline, memory, device)
                is_ready = True
            large = upscaler(frames, item.prompt, lambda: item.generator("upscale"), item.negative_prompt)  # noqa: B023
            if keyframe is not None:
                large[video["keyframe_index"]] = np.asarray(keyframe.image)
            target.write_keyframe(item, Image.fromarray(large[video["keyframe_index"]]), {"id": item.id})
            target.write_video(item, large, video["fps"], record)
        on_done(item, is_new)


def _full_size_keyframe(item: PromptItem, height: int, width: int, resize_mode: ResizeMode) -> Any:
    """The user's key frame at a size; None if there is none, or it is smaller."""
    if item.is_drawn:
        return None
    source = KeyframePipeline(item.image, resize_mode) if isinstance(item.image, Path) else None
    keyframe = make_item_keyframe(item, source, height, width)
    size = keyframe.provenance["original_size"]
    return keyframe if size["height"] >= height and size["width"] >= width else None
