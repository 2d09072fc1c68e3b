"""What a video and its key frame are sampled with, apart from texts, images and seeds, in the Python API and in `sample`.

None stands for the model's own value.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import with_config

from microcinema.config import types
from microcinema.config.instantiate import check_fields
from microcinema.utils.errors import UserError

OnFlagged = Literal["error", "skip", "keep"]
ResizeMode = Literal["crop", "stretch", "exact"]
"""How an image is brought to the video's size: `crop` scales it to cover the video and crops the center, as for training clips;
`stretch` scales each direction separately; `exact` refuses an image of another size."""

InitialNoise = Literal["prior", "analytic", "frame_init"]
Preset = Literal["quality", "balanced", "fast"]
_PLAIN = {"guidance_interval": (0.0, 1.0), "guidance_reuse": 1, "cache_interval": 1}
PRESETS: dict[Preset, dict[str, Any]] = {
    "quality": _PLAIN,
    "balanced": {**_PLAIN, "num_inference_steps": 15, "keyframe_num_inference_steps": 25},
    "fast": {**_PLAIN, "num_inference_steps": 10, "keyframe_num_inference_steps": 25},  # of one frame: they cost little
}
"""Settings for which None stands, by the name of the preset; what one does not name is the model's own, as are steps of videos that are fewer."""

OWN = ("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "image_guidance_scale")
_DEFAULTS = {**dict(zip(OWN, OWN, strict=True)), "gamma": "noise_prior_gamma"}
"""Settings for which None stands for a value in the pipeline's config, and its key there."""


@dataclass(frozen=True, kw_only=True)
class DenoisingSettings:
    """How clips are denoised: keys of `sample` and of every evaluation. None: that of the preset, or else the model's own.

    Args:
        preset: a column of `PRESETS`; it names the steps of key frames as well.
        num_inference_steps: denoising steps.
        scheduler: a scheduler class of diffusers.
        guidance_scale, image_guidance_scale: of text and key frame, see `Guidance`; 1 is no guidance.
        guidance_interval, guidance_reuse, guidance_rescale, apg_eta, apg_norm_threshold, apg_momentum: see `Guidance`.
        cache_interval: of so many steps one computes the network's deep features, and the others take them over, see `StepCache`.
        gamma: moves the start of sampling towards the key frame, see `NoisePrior.initial_noise`; 0 for none.
    """

    preset: Preset = "quality"
    num_inference_steps: types.Count | None = None
    scheduler: types.Name | None = None
    guidance_scale: types.NotNegative | None = None
    image_guidance_scale: types.NotNegative | None = None
    guidance_interval: tuple[types.Fraction, types.Fraction] | None = None
    guidance_reuse: types.Count | None = None
    guidance_rescale: types.Fraction = 0.0
    apg_eta: types.NotNegative = 1.0
    apg_norm_threshold: types.Positive | None = None
    apg_momentum: types.Momentum = 0.0
    cache_interval: types.Count | None = None
    gamma: types.NotNegative | None = None


@dataclass(frozen=True)
class SamplingSettings(DenoisingSettings):
    """Settings of stage 2. `ImageToVideoPipeline.resolve` fills in the values of the preset and the model's own.

    Args:
        height, width: pixels; multiples of the model's stride.
        num_frames: of a clip; more than the model was trained with are made in windows, see `Windows`.
        fps: frames per second.
        motion: how much moves, as the percentile of the training clips' motion scores, from 0 to 1; None: that is left to the model.
        keyframe_noise: level of noise on the key frame, in deviations of its latents, for a model trained with such noise.
        start_time: share of the training schedule at which sampling starts, as the sampler's first timestep that is not later.
        initial_noise: from which it starts, see `initial_latents`.
        num_segments: clips made one after the other, each from the last frame of the one before, which is in the video once:
            `num_segments * (num_frames - 1) + 1` frames.
        window_overlap: frames that windows share; None: half a window.
        interpolate: makes a video of so many times the frame rate of it, `interpolate * (f - 1) + 1` of f frames: neighboring frames are key
            frames of denser clips.
        decode_chunk_size: frames that the VAE decodes at once; None: as many as free GPU memory holds, on a CPU all of a clip.
    """

    height: types.Size | None = None
    width: types.Size | None = None
    num_frames: types.Size | None = None
    fps: types.Fps | None = None
    motion: types.Fraction | None = None
    keyframe_noise: types.NotNegative = 0.0
    start_time: types.Fraction = 1.0
    initial_noise: InitialNoise = "prior"
    num_segments: types.Count = 1
    window_overlap: types.CountOrZero | None = None
    interpolate: types.RateFactor = 1
    decode_chunk_size: types.Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.guidance_interval is not None and self.guidance_interval[0] > self.guidance_interval[1]:
            raise UserError(f"guidance_interval is {list(self.guidance_interval)}; begin with the lower number")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "SamplingSettings":
        """The settings of a Python call; an unknown one is a UserError."""
        if unknown := sorted(settings.keys() - cls.__dataclass_fields__.keys()):
            raise UserError(f"argument '{unknown[0]}' is unknown; use those of SamplingSettings")
        return cls(**settings)

    def resolve(self, defaults: Mapping[str, Any], stride: int) -> "SamplingSettings":
        """The settings with the values of a pipeline's config in place of None; a UserError if no size of this stride results."""
        values = {name: defaults[key] for name, key in _DEFAULTS.items()} | PRESETS[self.preset]
        # A model of few steps samples in these with every preset.
        values["num_inference_steps"] = min(values["num_inference_steps"], defaults["num_inference_steps"])
        settings = replace(self, **{name: value for name, value in values.items() if getattr(self, name, 0) is None})
        if settings.height is None or settings.width is None:
            raise UserError("the model does not say at which size it was trained; give height and width")
        for name, value in (("height", settings.height), ("width", settings.width)):
            if value < stride or value % stride:
                nearest = max(1, round(value / stride)) * stride
                raise UserError(f"{name} {value} is not a positive multiple of {stride}; use for example {nearest}")
        return replace(settings, fps=float(settings.fps or 0))


@with_config(types.CONFIG)
@dataclass(frozen=True)
class KeyframeSettings:
    """The text-to-image model of stage 1 and its settings: the group `keyframe` of `sample`.

    Args:
        pretrained_model_name_or_path: None: the base of the video model.
        revision, variant: of a hub repository; of the weight files, such as `fp16`.
        torch_dtype: of its weights; None: that of stage 2.
        lora: its LoRAs, as `Lora.of` reads them; None: those of stage 2 that fit it.
        height, width: size in pixels at which it draws; None: its own.
        num_inference_steps, guidance_scale: None: those that the video model was saved with for stage 1, or else those of the video.
        resize_mode: how an image is brought to the size of the video.
        on_flagged: what becomes of a picture that the model's safety checker flags, and blackens: `error`, the call ends; `skip`, no
            video is made of it; `keep`, it is animated as it is.

    Raises:
        UserError: a value out of range, or one of height and width.
    """

    pretrained_model_name_or_path: types.PathText | None = None
    revision: types.Name | None = None
    variant: types.Name | None = None
    torch_dtype: types.Dtype | None = None
    lora: tuple[types.StrictPath, ...] | None = None
    height: types.Size | None = None
    width: types.Size | None = None
    num_inference_steps: types.Count | None = None
    guidance_scale: types.NotNegative | None = None
    resize_mode: ResizeMode = "crop"
    on_flagged: OnFlagged = "error"

    def __post_init__(self) -> None:
        check_fields(self, "keyframe.")
        if (self.height is None) != (self.width is None):
            raise UserError(f"keyframe.height={self.height}, keyframe.width={self.width}; give both, or neither")


@with_config(types.CONFIG)
@dataclass(frozen=True)
class MemorySettings:
    """Settings that trade time for memory. Frames stay the same up to rounding, except with the last two and `vae_tiling`.

    Args:
        torch_dtype: of the networks; latents and schedule stay in float32.
        offload: where networks wait until they are used. `none`: on the device; `model`: in CPU memory, and each network is moved to
            the device as a whole; `group`: the same for each layer, on CUDA while the one before it computes; `sequential`: for each
            layer once it is its turn, which is by far the slowest.
        vae_slicing: the VAE encodes and decodes one frame at a time.
        vae_tiling: the VAE encodes and decodes frames larger than it was trained with in overlapping tiles, which are blended. Its
            attention then sees a tile instead of the whole frame, which changes frames by more than rounding.
        attention: `sdpa`, torch's scaled dot-product attention, or `xformers` in all spatial layers.
        compile: compile the denoiser with torch.compile; the first step takes minutes.
        quantization: `int8`, the denoiser's linear layers and convolutions are stored in eight bits and brought to `torch_dtype` one by
            one; frames change by more than rounding.
        preview_vae: folder or hub repository of an `AutoencoderTiny` for the base's latents, which decodes the videos in the place of the
            VAE and in less memory; None: the VAE does.

    Raises:
        UserError: an unknown choice, or two that exclude each other.
    """

    torch_dtype: types.Dtype = "float32"
    offload: Literal["none", "model", "group", "sequential"] = "none"
    vae_slicing: bool = False
    vae_tiling: bool = False
    attention: Literal["sdpa", "xformers"] = "sdpa"
    compile: bool = False
    quantization: Literal["int8"] | None = None
    preview_vae: types.PathText | None = None

    def __post_init__(self) -> None:
        check_fields(self, "memory.")
        if self.compile and self.offload in ("group", "sequential"):
            raise UserError(f"compile=true and offload={self.offload} exclude each other; use offload=model, or none")
        if self.quantization is not None and self.offload == "sequential":
            raise UserError("quantization=int8 and offload=sequential exclude each other; use offload=group, or none")


@with_config(types.CONFIG)
@dataclass(frozen=True)
class UpscaleSettings:
    """The image upscaler of stage 3 and its settings: the group `upscale` of `sample`.

    Args:
        pretrained_model_name_or_path: None: there is no stage 3.
        revision, variant: of a hub repository; of the weight files, such as `fp16`.
        num_inference_steps, guidance_scale, noise_level: of the pipeline's calls; None: its own defaults.
        chunk_size: frames upscaled at once.
    """

    pretrained_model_name_or_path: types.PathText | None = None
    revision: types.Name | None = None
    variant: types.Name | None = None
    num_inference_steps: types.Count | None = None
    guidance_scale: types.NotNegative | None = None
    noise_level: types.CountOrZero | None = None
    chunk_size: types.Count = 1

    def __post_init__(self) -> None:
        check_fields(self, "upscale.")
