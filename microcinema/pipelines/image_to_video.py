"""Stage 2: a key frame and a text become a video. Shapes: latents `b f c h w`, frames `b f 3 H W`, key frame `b 3 H W`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from einops import rearrange
from PIL import Image
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from microcinema.config.sampling import OWN, KeyframeSettings, SamplingSettings
from microcinema.data.keyframe_index import keyframe_index
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.schedule import (
    alphas_cumprod,
    check_sampler,
    make_sampler,
    make_scheduler,
    match_snr_timesteps,
    schedule_summary,
    set_timesteps,
)
from microcinema.models.vae import decode_latents, encode_pixels, vae_scale_factor
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.captions import Captions
from microcinema.pipelines.clip_sampler import ClipSampler
from microcinema.pipelines.components import COMPONENTS, OPTIONAL_COMPONENTS, load_missing_components
from microcinema.pipelines.denoise import CALLBACK_TENSORS, StepCallback, make_guidance
from microcinema.pipelines.encoders import encode_image_tokens, encode_motion_tokens, encode_text
from microcinema.pipelines.keyframe import PixelImage, as_tensor, make_keyframe
from microcinema.pipelines.keyframe_places import TrainedPlaces, check_interpolation, keyframe_images
from microcinema.pipelines.long_video import Windows, check_continuation, notices
from microcinema.pipelines.lora import VideoLoraMixin
from microcinema.pipelines.prompts import check_generators
from microcinema.utils.errors import UserError, check_choice
from microcinema.utils.logging import warn_once


@dataclass
class ImageToVideoOutput(BaseOutput):
    """Videos.

    Attributes:
        frames: by `output_type`: `pil` lists of images, `np` (b, f, H, W, 3) and `pt` (b, f, 3, H, W) in [0, 1], `latent` z0
            (b, f, c, h, w), scaled.
        keyframes: of each video, at its size.
    """

    frames: Any
    keyframes: list[Image.Image]


class ImageToVideoPipeline(VideoLoraMixin, DiffusionPipeline):
    """Key frame and text to video. What depends on neither noise nor time is computed once, before the denoising loop.

    Args:
        vae, text_encoder, tokenizer: of the base model; if one is None, all are loaded from `base`.
        unet: the denoiser, which encodes its conditions as well.
        scheduler: of sampling; it must agree with the training schedule.
        text_encoder_2, tokenizer_2, force_zeros_for_empty_prompt: of a base with two text encoders, as diffusers' SDXL pipeline.
        image_encoder, motion_encoder, motion_tokenizer: of the adapter and of motion captions, if the model uses them; None: loaded
            from `image_encoder_source` (None: the base) and `motion_encoder_source`.
        noise_prior, noise_prior_strength, noise_prior_gamma: the settings of `NoisePrior`; gamma is the default of a call, None:
            that of `NoisePrior.resolve`.
        keyframe_position: frame of a training clip that is the key frame: `first`, `center` or an index.
        num_frames, fps, height, width: of the training clips, and the defaults of a call. Pixels; None: the base's training size.
        num_inference_steps, guidance_scale, image_guidance_scale: the defaults of a call, see `SamplingSettings`.
        keyframe_num_inference_steps, keyframe_guidance_scale: the defaults of stage 1; None: as those of the video.
        base, base_revision, base_variant: the text-to-image model that this one was trained from. It draws key frames by default, and
            provides the components that a saved folder leaves out.
        unet_source: the model whose frozen UNet weights a folder saved without the base leaves out.
        training_schedule: settings of the schedule that the model was trained with; None: those of the scheduler.
        network_schedule: settings of the base's schedule, by whose timesteps the network knows noise levels; None: the same schedule.
        image_mean, image_std: of the colors (from 0 to 1) that the image encoder was trained with.
        num_motion_tokens: length to which motion captions are padded or cut.
        motion_quantiles: motion scores of the training clips at evenly spaced percentiles from 0 to 100; None: `motion` cannot be asked for.

    Raises:
        UserError: unknown settings, or components or schedules that do not fit together.
    """

    # `DiffusionPipeline.from_pretrained` passes None for those that the folder does not have.
    _optional_components: ClassVar = [*OPTIONAL_COMPONENTS]
    _callback_tensor_inputs: ClassVar = [*CALLBACK_TENSORS]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->motion_encoder->image_encoder->unet->vae"
    preview_vae: AutoencoderTiny | None = None  # decodes in the place of the VAE; not a part of the saved pipeline

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: VideoUNet,
        scheduler: SchedulerMixin,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        motion_encoder: T5EncoderModel | None = None,
        motion_tokenizer: T5TokenizerFast | None = None,
        noise_prior: str = "appearance",
        noise_prior_strength: float = 0.03,
        noise_prior_gamma: float | None = None,
        keyframe_position: str | int = "first",
        num_frames: int = 16,
        fps: float = 8.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.0,
        keyframe_num_inference_steps: int | None = None,
        keyframe_guidance_scale: float | None = None,
        base: str | None = None,
        base_revision: str | None = None,
        base_variant: str | None = None,
        unet_source: str | None = None,
        training_schedule: dict[str, Any] | None = None,
        network_schedule: dict[str, Any] | None = None,
        image_encoder_source: str | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        motion_encoder_source: str | None = None,
        num_motion_tokens: int = 32,
        motion_quantiles: Sequence[float] | None = None,
        force_zeros_for_empty_prompt: bool = False,
    ):
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        components = {name: config.pop(name) for name in COMPONENTS}
        super().__init__()
        load_missing_components(components, config)
        self.register_modules(**components)
        self.vae_scale_factor = vae_scale_factor(self.vae)
        size = unet.options.unet2d.get("sample_size") or 0
        native = [side * self.vae_scale_factor or None for side in ([size, size] if isinstance(size, int) else size)]
        config |= {"height": height or native[0], "width": width or native[1]}
        config["training_schedule"] = training_schedule or schedule_summary(scheduler)
        abar_T = alphas_cumprod(make_scheduler(config["training_schedule"]))[-1].item()
        prior = NoisePrior(noise_prior, noise_prior_strength, noise_prior_gamma).resolve(abar_T)
        self.register_to_config(**{**config, "noise_prior_gamma": prior.gamma})
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)
        keyframe_index(keyframe_position, num_frames)
        SamplingSettings.of({name: config[name] for name in OWN})
        KeyframeSettings(num_inference_steps=keyframe_num_inference_steps, guidance_scale=keyframe_guidance_scale)
        check_sampler(self.training_scheduler, scheduler)

    @property
    def num_timesteps(self) -> int:
        """How many steps, and calls of `callback_on_step_end`, each clip of the last call takes."""
        return self._num_timesteps

    @property
    def noise_prior(self) -> NoisePrior:
        """Of the noise in training, and of that from which sampling starts."""
        return NoisePrior(*(self.config[f"noise_prior{suffix}"] for suffix in ("", "_strength", "_gamma")))

    @property
    def keyframe_position(self) -> str | int:
        """The frame of a clip that is the key frame."""
        return self.config["keyframe_position"]

    @property
    def training_scheduler(self) -> DDPMScheduler:
        """The schedule that the model was trained with."""
        return make_scheduler(self.config["training_schedule"])

    @property
    def remapped_timesteps(self) -> torch.Tensor | None:
        """For every step of the training schedule, that of the base's schedule with the same SNR, (t,); None: the same step."""
        schedule = self.config["network_schedule"]
        return schedule and match_snr_timesteps(self.training_scheduler, make_scheduler(schedule))

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """Embeddings (b, n, d) of texts; of SDXL with one row more, see `pipelines.encoders.encode_text`."""
        zeros_for_empty = self.config["force_zeros_for_empty_prompt"]
        return encode_text(self.components, texts, zeros_for_empty, self._execution_device)

    @property
    def text_lengths(self) -> dict[str, tuple[Any, int]]:
        """Of the texts of a call, by their names, for `unread_texts`."""
        length = self.tokenizer, self.tokenizer.model_max_length
        motion = {"motion_prompt": (self.motion_tokenizer, self.config["num_motion_tokens"])}
        return {"prompt": length, "negative_prompt": length, **(motion if self.uses_motion_caption else {})}

    @property
    def uses_motion_caption(self) -> bool:
        """Whether the motion encoder encodes a motion caption, for the temporal layers; the spatial layers then get the prompt."""
        return self.motion_encoder is not None

    def encode_motion(self, captions: list[str]) -> torch.Tensor:
        """Tokens (b, n, e) of motion captions, by the motion encoder; padding is zero."""
        encoder = self.motion_encoder, self.motion_tokenizer
        return encode_motion_tokens(*encoder, captions, self.config["num_motion_tokens"], self._execution_device)

    def encode_pixels(self, image: torch.Tensor, image_tokens: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Inputs of `VideoUNet.encode` from the pixels of key frames (b, 3, H, W) in [-1, 1], by name.

        Args:
            image_tokens: of the image encoder, if the model has one, (b, p, e); None: computed here.
        """
        image, inputs = image.to(self._execution_device), {}
        if self.image_encoder is not None:
            if image_tokens is None:
                colors = self.config["image_mean"], self.config["image_std"]
                image_tokens = encode_image_tokens(self.image_encoder, image, *colors)
            inputs["image_tokens"] = image_tokens
        if self.uses_keyframe_pixels:
            inputs["pixels"] = image
        return inputs

    @property
    def uses_keyframe_pixels(self) -> bool:
        """Whether pixel-aware attention uses the pixels of the key frame."""
        return self.unet.options.pixels is not None

    @property
    def uses_image_conditioning(self) -> bool:
        """Whether the network uses more of a key frame than its latents."""
        return self.uses_keyframe_pixels or self.unet.options.adapter is not None

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Scaled latents (b, c, h, w), float32, of images (b, 3, H, W) in [-1, 1]."""
        return encode_pixels(self.vae, image, self._execution_device)

    def decode_latents(self, latents: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
        """Pixels (b, f, 3, H, W) in [-1, 1] of scaled latents (b, f, c, h, w), `chunk_size` frames at a time."""
        return decode_latents(self.preview_vae or self.vae, latents, chunk_size)

    def resolve(self, settings: SamplingSettings) -> SamplingSettings:
        """The settings with the model's own values in place of None; a UserError if they do not work with this model."""
        stride = self.vae_scale_factor * self.unet.stride
        settings = settings.resolve(self.config, stride)
        assert settings.num_frames is not None
        self.windows(settings).keyframe_index(self.keyframe_position)
        places, frames = self.trained_places, settings.num_segments * (settings.num_frames - 1) + 1
        continued = "first" if places.fault([0], settings.num_frames) is None else self.keyframe_position
        check_continuation(settings.num_segments, settings.num_frames, continued)
        check_interpolation(settings.interpolate, frames, self.config["num_frames"], places)
        self.motion_score(settings.motion)
        if settings.keyframe_noise and not self.unet.options.keyframe_noise:
            fault = f"keyframe_noise={settings.keyframe_noise:g}, but the model was trained without"
            raise UserError(f"{fault}; use keyframe_noise=0, or a model trained with model.keyframe_noise=true")
        return settings

    def motion_score(self, motion: float | None) -> float | None:
        """The motion score at a percentile of the training clips, from 0 to 1; a UserError if the model was not trained with scores."""
        if motion is None:
            return None
        if (scores := self.config["motion_quantiles"]) is None or not self.unet.options.motion_score:
            fault = f"motion={motion:g}, but the model was not trained with motion scores"
            raise UserError(f"{fault}; use motion=null, or a model trained with model.motion_score=true")
        return float(np.interp(motion, np.linspace(0, 1, len(scores)), scores))

    @property
    def trained_places(self) -> TrainedPlaces:
        """The places of key frames that the model was trained for."""
        return TrainedPlaces(self.keyframe_position, self.unet.options.keyframe_places, self.uses_image_conditioning)

    def main_keyframe(self, keyframes: Collection[int], settings: SamplingSettings) -> int:
        """The place of the main one of key frames at chosen places, of a clip of resolved settings; a UserError if it cannot have them."""
        assert settings.num_frames is not None
        if settings.num_frames > (trained := self.config["num_frames"]):
            fault = f"keyframes are of a clip, and num_frames={settings.num_frames} is more than the {trained} of one"
            raise UserError(f"{fault}; use num_segments or interpolate for a longer video")
        return self.trained_places.main(keyframes, settings.num_frames)

    def windows(self, settings: SamplingSettings) -> Windows:
        """The windows over the frames of a clip, of which the settings name the number."""
        assert settings.num_frames is not None
        return Windows(settings.num_frames, self.config["num_frames"], settings.window_overlap)

    def sampler(self, settings: SamplingSettings, device: torch.device | None = None) -> SchedulerMixin:
        """The scheduler of resolved settings, or else the pipeline's own, with its timesteps; a UserError if it is not right."""
        name, steps = settings.scheduler, settings.num_inference_steps or 0
        sampler = make_sampler(self.scheduler, name) if name else self.scheduler
        return set_timesteps(sampler, steps, device, settings.start_time)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: PixelImage | Sequence[PixelImage] | None = None,
        motion_prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        keyframes: Mapping[int, PixelImage | Sequence[PixelImage] | None] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        **settings: Any,
    ) -> ImageToVideoOutput:
        """Animates key frames.

        Args:
            prompt: content and motion of the video; one, or one per video.
            image, motion_prompt, negative_prompt: one for all prompts, or one each. Images (`PixelImage`, or a batch of them), resized
                and cropped to the video's size; the motion, for a model that `uses_motion_caption` (None: the prompt); what replaces the
                text where guidance drops it (None: the empty text).
            prompt_embeds, negative_prompt_embeds: in the place of those texts, (b, n, d) as `encode_text` or compel make them: of as many
                tokens, which may be more than the text encoder's.
            num_videos_per_prompt: videos of one prompt follow one another in the result.
            generator: one per video (which makes a video independent of its batch), or one for all.
            output_type: `pil`, `np`, `pt` or `latent`.
            callback_on_step_end, callback_on_step_end_tensor_inputs: see `StepCallback`. Steps of each clip are counted from 0.
            return_dict: False: a tuple, of frames and key frames.
            keyframes: images by their places in a clip, as `image`, or None for `image` itself; None: `image` is at the model's own place.
            settings: those of `SamplingSettings`.
        """
        texts = Captions(prompt, motion_prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        resolved, videos = self.resolve(SamplingSettings.of(settings)), texts.count * num_videos_per_prompt
        if num_videos_per_prompt < 1:
            raise UserError(f"num_videos_per_prompt={num_videos_per_prompt}; use a number >= 1")
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        if generator is not None:
            generators = check_generators(generator, videos)
            generator = generators if isinstance(generator, Sequence) else generator
        own = keyframe_index(self.keyframe_position, self.windows(resolved).slices[0].stop)
        images = keyframe_images(image, keyframes, own, texts.count)
        if keyframes is not None:
            self.main_keyframe(keyframes, resolved)
        step_end = StepCallback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        captions = texts.encode(self, videos)
        output = self._animate(images, captions, resolved, videos, generator, step_end, output_type)
        return output if return_dict else output.to_tuple()

    def _animate(
        self,
        images: Mapping[int, list[Image.Image]],
        captions: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        settings: SamplingSettings,
        videos: int,
        generator: torch.Generator | list[torch.Generator] | None,
        step_end: StepCallback,
        output_type: str,
    ) -> ImageToVideoOutput:
        height, width = settings.height, settings.width
        assert height and width and settings.num_inference_steps and settings.num_frames and settings.fps is not None
        check_sampler(self.training_scheduler, self.scheduler)
        windows = self.windows(settings)
        for notice in notices(windows, settings.num_segments):
            warn_once(notice)
        sampler = ClipSampler(self, settings, make_guidance(settings), captions, generator, step_end)
        frames = {place: [make_keyframe(i, height, width, {}).image for i in batch] for place, batch in images.items()}
        main = frames[self.trained_places.main(frames, windows.slices[0].stop)]
        pixels = {place: as_tensor(batch) for place, batch in frames.items()}
        clips, in_latents = [], output_type == "latent" or settings.interpolate > 1
        for clip in range(settings.num_segments):
            keyframes = {place: self.encode_image(image) for place, image in pixels.items()}
            z = sampler(windows, settings.fps, keyframes, pixels.__getitem__)
            clips.append(z if in_latents else self.decode_latents(z, settings.decode_chunk_size).float())
            if clip < settings.num_segments - 1:
                last = self.decode_latents(z[:, -1:]) if in_latents else clips[-1][:, -1:]
                pixels = {0: as_tensor(self.video_processor.postprocess(last[:, 0].float(), "pil"))}
        video = torch.cat([clips[0], *(clip[:, 1:] for clip in clips[1:])], dim=1)  # each starts where the last ended
        if settings.interpolate > 1:
            video = sampler.interpolate(video)
            video = video if output_type == "latent" else self.decode_latents(video, settings.decode_chunk_size).float()
        if output_type != "latent":
            video = self.video_processor.postprocess_video(rearrange(video, "b f c h w -> b c f h w"), output_type)
        self.maybe_free_model_hooks()
        return ImageToVideoOutput(video, [image for image in main for _ in range(videos // len(main))])
