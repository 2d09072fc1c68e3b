"""What a video and its key frame are sampled with, apart from texts, images and seeds. None stands for the model's own value."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from microcinema.config.network import Count
from microcinema.config.schema import NotNegative
from microcinema.pipelines.keyframe import ResizeMode
from microcinema.utils.errors import UserError

_OWN = ("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "image_guidance_scale")
_DEFAULTS = {**dict(zip(_OWN, _OWN, strict=True)), "gamma": "noise_prior_gamma"}
"""Settings for which None stands for a value in the pipeline's config, and its key there."""


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of stage 2. `ImageToVideoPipeline.resolve` fills in the model's own values.

    Args:
        height, width: pixels; multiples of the model's stride.
        num_frames: of a clip; more than the model was trained with are made in windows, see `Windows`.
        fps: frames per second.
        num_inference_steps: denoising steps.
        guidance_scale, image_guidance_scale: of text and key frame, see `CFG`; 1 is no guidance.
        gamma: moves the start of sampling towards the key frame, see `NoisePrior.initial_noise`; 0 for none.
        num_segments: clips made one after the other, each from the last frame of the one before, which is in the video once:
            `num_segments * (num_frames - 1) + 1` frames.
        window_overlap: frames that windows share; None: half a window.
        decode_chunk_size: frames that the VAE decodes at once; None: all of a clip.

    Raises:
        UserError: a value out of range.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    gamma: float | None = None
    num_segments: int = 1
    window_overlap: int | None = None
    decode_chunk_size: int | None = None

    def __post_init__(self) -> None:
        counts = {"num_frames", "num_inference_steps", "decode_chunk_size", "num_segments"}
        for name in sorted(counts | {"guidance_scale", "image_guidance_scale", "fps", "gamma"}):
            value = getattr(self, name)
            if value is not None and not (1 if name in counts else 0) <= value < float("inf"):
                raise UserError(f"{name} is {value}; use a number >= {1 if name in counts else 0}")
        if self.fps == 0:
            raise UserError("fps is 0; use a number > 0")

    def resolve(self, defaults: Mapping[str, Any], stride: int) -> "SamplingSettings":
        """The settings with the values of a pipeline's config in place of None; a UserError if no size of this stride results."""
        settings = replace(
            self, **{name: defaults[key] for name, key in _DEFAULTS.items() if getattr(self, name) is None}
        )
        if settings.height is None or settings.width is None:
            raise UserError("the model does not say at which size it was trained; give height and width")
        for name, value in (("height", settings.height), ("width", settings.width)):
            if value < stride or value % stride:
                nearest = max(1, round(value / stride)) * stride
                raise UserError(f"{name} {value} is not a positive multiple of {stride}; use for example {nearest}")
        return replace(settings, fps=float(settings.fps or 0))


@dataclass(frozen=True)
class KeyframeSettings:
    """The text-to-image model of stage 1 and its settings: the group `keyframe` of `sample`.

    Args:
        pretrained_model_name_or_path: None: the base of the video model.
        revision, variant: of a hub repository; of the weight files, such as `fp16`.
        torch_dtype: of its weights; None: that of stage 2.
        height, width: size in pixels at which it draws; None: its own.
        num_inference_steps, guidance_scale: None: those that the video model was saved with for stage 1, or else those of the video.
        resize_mode: how an image is brought to the size of the video.
    """

    pretrained_model_name_or_path: str | None = None
    revision: str | None = None
    variant: str | None = None
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    height: Count | None = None
    width: Count | None = None
    num_inference_steps: Count | None = None
    guidance_scale: NotNegative | None = None
    resize_mode: ResizeMode = "crop"
