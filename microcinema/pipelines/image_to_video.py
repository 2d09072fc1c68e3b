"""Stage 2: a key frame and a text become a video."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from einops import rearrange, repeat
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection, T5EncoderModel, T5TokenizerFast

from microcinema.data.keyframe_index import keyframe_index
from microcinema.diffusion.guidance import Guidance
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.schedule import (
    check_sampler,
    make_scheduler,
    match_snr_timesteps,
    set_timesteps,
    step_arguments,
)
from microcinema.models.conditioning import ConditionEncoder, Conditions
from microcinema.models.vae import decode_latents, encode_pixels, vae_scale_factor
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.base_model import BASE_COMPONENTS, check_compatible, load_base_components
from microcinema.pipelines.encoders import (
    IMAGE_ENCODER,
    MOTION_ENCODER,
    MOTION_TOKENIZER,
    encode_image_tokens,
    encode_motion_tokens,
    encode_text,
    load_image_encoder,
    load_motion_encoder,
)
from microcinema.pipelines.keyframe import PixelImage, as_pil, as_tensor, make_keyframe
from microcinema.pipelines.long_video import Windows, check_continuation, continuation_notice, join_segments
from microcinema.pipelines.prompts import broadcast_to_prompts
from microcinema.utils.errors import UserError

_LOG = logging.getLogger(__name__)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


@dataclass
class ImageToVideoOutput(BaseOutput):
    """Videos.

    Attributes:
        frames: by `output_type`: `pil` lists of images, `np` (b, f, h, w, 3) and `pt` (b, f, 3, h, w) in [0, 1], `latent` z0
            (b, f, c, h/8, w/8), scaled.
        keyframes: the images that the videos were made from, at the videos' size.
    """

    frames: Any
    keyframes: list[Image.Image]


def describe_schedule(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The settings that decide the noise levels and the target of a training schedule."""
    config = make_scheduler(scheduler.config).config
    return {key: config[key] for key in _SCHEDULE_KEYS if key in config}


class ImageToVideoPipeline(DiffusionPipeline):
    """Key frame and text to video: everything that depends on neither noise nor time is computed once, then the loop runs.

    Args:
        vae, text_encoder, tokenizer: of the base; if one is None, all are opened from `base`.
        unet: the denoiser.
        condition_encoder: makes its conditions, with the AppearanceNet inside.
        scheduler: of sampling; it must agree with the training schedule.
        image_encoder: reads the key frame for the adapter, if the condition encoder has one; None: opened from its source.
        motion_encoder, motion_tokenizer: read the motion caption, if the condition encoder listens; None: opened from their source.
        noise_prior, noise_prior_strength, noise_prior_gamma: the settings of `NoisePrior`.
        keyframe_position: which frame of a clip the key frame is in training: `first`, `center` or an index.
        num_frames, fps, height, width: what the model was trained with, and the defaults of a call. Size in pixels; None is
            the size that the base was trained with.
        base: name or path of the text-to-image model that this one was trained from: draws key frames by default, and lends
            the parts that a saved folder leaves out.
        base_revision, base_variant: of a hub repository; which weight files, such as `fp16`.
        unet_source: name or path of the model whose UNet weights were frozen in training; a folder saved without the base has them
            from there.
        training_schedule: settings of the schedule that the model was trained with; None takes the scheduler's.
        network_schedule: settings of the schedule by whose times the networks know noise levels: the base's; None: the same one.
        image_encoder_source: name or path of the image encoder; None: the base's own.
        image_mean, image_std: of the colours (from 0 to 1) that the image encoder was trained with.
        motion_encoder_source: name or path of the motion encoder.
        num_motion_tokens: length that motion captions are padded or cut to.

    Raises:
        UserError: unknown settings, parts that do not fit together, or a scheduler that disagrees with the training schedule.
    """

    # Those that `DiffusionPipeline.from_pretrained` hands over as None if the folder has none.
    _optional_components: ClassVar = [*BASE_COMPONENTS, IMAGE_ENCODER, MOTION_ENCODER, MOTION_TOKENIZER]
    model_cpu_offload_seq = "text_encoder->motion_encoder->image_encoder->condition_encoder->unet->vae"
    _callback_tensor_inputs = ("latents", "prediction")

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: VideoUNet,
        condition_encoder: ConditionEncoder,
        scheduler: SchedulerMixin,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        motion_encoder: T5EncoderModel | None = None,
        motion_tokenizer: T5TokenizerFast | None = None,
        noise_prior: str = "appearance",
        noise_prior_strength: float = 0.03,
        noise_prior_gamma: float = 0.0,
        keyframe_position: str | int = "first",
        num_frames: int = 16,
        fps: float = 8.0,
        height: int | None = None,
        width: int | None = None,
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
    ):
        super().__init__()
        if training_schedule is None:
            training_schedule = describe_schedule(scheduler)
        lent = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        if any(part is None for part in lent.values()):
            lent = load_base_components(base, base_revision, base_variant, unet.dtype)
        check_compatible("the video pipeline", lent["vae"], lent["text_encoder"], unet)
        if condition_encoder.config["adapter"] is None:
            image_encoder = None
        elif image_encoder is None:
            if image_encoder_source is None and base is None:
                raise UserError("the adapter's image encoder is not here, and no base is named to take it from")
            found = load_image_encoder(image_encoder_source, str(base), base_revision, base_variant, unet.dtype)
            image_encoder, image_mean, image_std = (found[key] for key in (IMAGE_ENCODER, "image_mean", "image_std"))
        if condition_encoder.config["motion"] is None:
            motion_encoder = motion_tokenizer = None
        elif motion_encoder is None:
            if motion_encoder_source is None:
                raise UserError("the model reads motion captions, and its motion encoder is neither here nor named")
            motion_encoder, motion_tokenizer = load_motion_encoder(motion_encoder_source, unet.dtype).values()
        self.register_modules(
            **lent,
            unet=unet,
            condition_encoder=condition_encoder,
            scheduler=scheduler,
            image_encoder=image_encoder,
            motion_encoder=motion_encoder,
            motion_tokenizer=motion_tokenizer,
        )
        self.vae_scale_factor = vae_scale_factor(self.vae)
        native = (unet.config["sample_size"] or 0) * self.vae_scale_factor or None
        self.register_to_config(
            noise_prior=noise_prior,
            noise_prior_strength=noise_prior_strength,
            noise_prior_gamma=noise_prior_gamma,
            keyframe_position=keyframe_position,
            num_frames=num_frames,
            fps=fps,
            height=height or native,
            width=width or native,
            base=base,
            base_revision=base_revision,
            base_variant=base_variant,
            unet_source=unet_source,
            training_schedule=training_schedule,
            network_schedule=network_schedule,
            image_encoder_source=image_encoder_source,
            image_mean=image_mean,
            image_std=image_std,
            motion_encoder_source=motion_encoder_source,
            num_motion_tokens=num_motion_tokens,
        )
        # Hooks of offloading ask a network where its weights are; this one may have none.
        if next(condition_encoder.parameters(), None) is None:
            self.model_cpu_offload_seq = self.model_cpu_offload_seq.replace("condition_encoder->", "")
            self._exclude_from_cpu_offload = ["condition_encoder"]
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)
        NoisePrior(noise_prior, noise_prior_strength, noise_prior_gamma)
        keyframe_index(keyframe_position, num_frames)
        check_sampler(self.training_scheduler, scheduler)
        self._said: set[str] = set()

    @property
    def noise_prior(self) -> NoisePrior:
        """Which noise the model was trained with and starts from."""
        return NoisePrior(*(self.config[f"noise_prior{part}"] for part in ("", "_strength", "_gamma")))

    @property
    def keyframe_position(self) -> str | int:
        """Which frame of a clip the key frame is."""
        return self.config["keyframe_position"]

    @property
    def training_scheduler(self) -> DDPMScheduler:
        """The schedule that the model was trained with."""
        return make_scheduler(self.config["training_schedule"])

    @property
    def remapped_timesteps(self) -> torch.Tensor | None:
        """What the networks are told for every step of the training schedule, (t,); None: the step."""
        if self.config["network_schedule"] is None:
            return None
        return match_snr_timesteps(self.training_scheduler, make_scheduler(self.config["network_schedule"]))

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """Embeddings (b, n, d) of texts."""
        return encode_text(self.tokenizer, self.text_encoder, texts, self._execution_device)

    @property
    def uses_motion_caption(self) -> bool:
        """Whether a motion caption is read apart: by the motion encoder; the prompt is then read by the spatial layers alone."""
        return self.motion_encoder is not None

    def encode_motion(self, captions: list[str]) -> torch.Tensor:
        """Tokens (b, n, e) of motion captions, by the motion encoder; padding is zero."""
        return encode_motion_tokens(
            self.motion_encoder,
            self.motion_tokenizer,
            captions,
            self.config["num_motion_tokens"],
            self._execution_device,
        )

    def encode_pixels(self, image: torch.Tensor, image_tokens: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """What the condition encoder reads of key frames (b, 3, H, W) in [-1, 1] beside their latents, by its arguments' names.

        Args:
            image_tokens: of the image encoder, (b, p, e); None: they are made.
        """
        made = {}
        image = image.to(self._execution_device)
        if self.image_encoder is not None:
            colours = self.config["image_mean"], self.config["image_std"]
            if image_tokens is None:
                image_tokens = encode_image_tokens(self.image_encoder, image, *colours)
            made["image_tokens"] = image_tokens
        if self.uses_keyframe_pixels:
            made["pixels"] = image
        return made

    @property
    def uses_keyframe_pixels(self) -> bool:
        """Whether pixel-aware attention looks at the key frame itself."""
        return self.condition_encoder.config["pixels"] is not None

    @property
    def uses_image_conditioning(self) -> bool:
        """Whether the condition encoder reads more of a key frame than its latents."""
        return any(self.condition_encoder.config[part] is not None for part in ("adapter", "pixels"))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Scaled latents (b, c, h, w), float32, of images (b, 3, H, W) in [-1, 1]."""
        return encode_pixels(self.vae, image, self._execution_device)

    def decode_latents(self, latents: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
        """Pixels (b, f, 3, H, W) in [-1, 1] of scaled latents (b, f, c, h, w), `chunk_size` frames at a time."""
        return decode_latents(self.vae, latents, chunk_size)

    def check(
        self,
        prompt: str | Sequence[str],
        height: int | None,
        width: int | None,
        num_frames: int | None,
        fps: float | None,
        num_segments: int = 1,
        window_overlap: int | None = None,
    ) -> tuple[list[str], int, int, int, float]:
        """Prompts, height, width, frames and frames per second of a call, with the model's defaults for what is None.

        Raises:
            UserError: an empty prompt, a size that does not divide, too few frames or clips, windows that overlap too much, a frame
                rate that is none.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) and text.strip() for text in prompts):
            raise UserError("the prompt is empty; say what is to be seen and how it moves")
        if (height or self.config["height"]) is None or (width or self.config["width"]) is None:
            raise UserError("the model does not say at which size it was trained; give height and width")
        height, width = (
            self.config[key] if value is None else value for key, value in (("height", height), ("width", width))
        )
        stride = self.vae_scale_factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        for name, value in (("height", height), ("width", width)):
            if value < stride or value % stride:
                nearest = max(1, round(value / stride)) * stride
                raise UserError(f"{name} {value} is not a positive multiple of {stride}; use for example {nearest}")
        num_frames = self.config["num_frames"] if num_frames is None else num_frames
        if num_frames < 1:
            raise UserError(f"num_frames is {num_frames}; use a number >= 1")
        Windows(num_frames, self.config["num_frames"], window_overlap)
        check_continuation(num_segments, num_frames, self.keyframe_position)
        fps = self.config["fps"] if fps is None else fps
        if not 0 < fps < float("inf"):
            raise UserError(f"fps is {fps}; use a number > 0")
        return prompts, height, width, num_frames, float(fps)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: PixelImage | Sequence[PixelImage],
        motion_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        decode_chunk_size: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_segments: int = 1,
        window_overlap: int | None = None,
    ) -> ImageToVideoOutput:
        """Animates key frames.

        Args:
            prompt: what is to be seen and how it moves; one, or one for every video.
            image: PIL images or uint8 arrays (h, w, 3): one for all prompts, or one each; resized and cropped to the video's size.
            motion_prompt: how it moves, for a model that `uses_motion_caption` apart; one for all prompts, or one each. None: the prompt.
            height, width: pixels; a multiple of the model's stride. None: as the model was trained.
            num_frames, fps: None: as the model was trained. More frames than that are made in windows, see `Windows`.
            num_inference_steps: denoising steps.
            guidance_scale, image_guidance_scale: see `Guidance`; 1 is no guidance.
            negative_prompt: stands where guidance drops the text; one for all prompts, or one each. None: the empty text.
            num_videos_per_prompt: videos of one prompt follow one another in the result.
            generator: one for every video (which makes a video independent of its batch), or one for all.
            decode_chunk_size: frames that the VAE decodes at once; None: all of a clip.
            output_type: `pil`, `np`, `pt` or `latent`.
            callback_on_step_end: called as `callback(pipeline, step, t, tensors)`; latents that it returns in such a dictionary
                replace those of the loop. The steps of every clip are counted from 0.
            callback_on_step_end_tensor_inputs: which tensors it gets, (b, f, c, h, w): `latents` after the step, `prediction`, the
                guided one of the step.
            num_segments: clips of `num_frames` made one after the other, each from the last frame of the one before. That frame is in
                the result once: `num_segments * (num_frames - 1) + 1` frames.
            window_overlap: frames that windows share where there are several; None: half a window.

        Raises:
            UserError: bad input; see `check`.
        """
        prompts, height, width, num_frames, fps = self.check(
            prompt, height, width, num_frames, fps, num_segments, window_overlap
        )
        count = len(prompts)
        self.check_motion_prompt(motion_prompt)
        motions = prompts if motion_prompt is None else broadcast_to_prompts("motion prompts", motion_prompt, count)
        images = broadcast_to_prompts("images", image, count)
        # One is encoded once, whatever the number of prompts.
        one = negative_prompt is None or isinstance(negative_prompt, str)
        negatives = broadcast_to_prompts(
            "negative prompts", "" if negative_prompt is None else negative_prompt, 1 if one else count
        )
        if num_videos_per_prompt < 1 or num_inference_steps < 1:
            raise UserError(
                f"num_videos_per_prompt={num_videos_per_prompt}, num_inference_steps={num_inference_steps}; both must be >= 1"
            )
        if decode_chunk_size is not None and decode_chunk_size < 1:
            raise UserError(
                f"decode_chunk_size is {decode_chunk_size}; use a number >= 1, or None for all frames at once"
            )
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type '{output_type}' is unknown; use one of {', '.join(OUTPUT_TYPES)}")
        if unknown := sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)):
            raise UserError(
                f"there is no tensor '{unknown[0]}' for callbacks; there are {', '.join(self._callback_tensor_inputs)}"
            )
        check_sampler(self.training_scheduler, self.scheduler)
        videos = count * num_videos_per_prompt
        if isinstance(generator, Sequence):
            generator = list(generator)
            if len(generator) != videos:
                raise UserError(f"{len(generator)} generators for {videos} videos; give one each, or one for all")
        windows = Windows(num_frames, self.config["num_frames"], window_overlap)
        if len(windows.slices) > 1:
            self._say_once(str(windows))
        if num_segments > 1:
            self._say_once(continuation_notice(num_segments, num_frames))

        current = [make_keyframe(as_pil(img), height, width, {}).image for img in images]
        keyframes = [img for img in current for _ in range(num_videos_per_prompt)]
        guidance = Guidance(text=guidance_scale, image=image_guidance_scale)

        def for_each_video(x: torch.Tensor) -> torch.Tensor:
            return repeat(x, "b ... -> (b n) ...", n=videos // len(x))

        captions = {"text": (self.encode_text(prompts), self.encode_text(negatives))}
        if self.uses_motion_caption:
            captions["motion_tokens"] = self.encode_motion(motions), self.encode_motion([""])
        captions = {name: (for_each_video(said), for_each_video(empty)) for name, (said, empty) in captions.items()}

        def step_end(step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
            if callback_on_step_end is None:
                return tensors["latents"]
            shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
            return (callback_on_step_end(self, step, t, shown) or {}).get("latents", tensors["latents"])

        clips = []
        for clip in range(num_segments):
            pixels = as_tensor(current)
            z_ref = for_each_video(self.encode_image(pixels))
            seen = {"z_ref": z_ref, **{name: for_each_video(x) for name, x in self.encode_pixels(pixels).items()}}
            # With offloading the VAE would stay where the denoiser needs the memory.
            self.maybe_free_model_hooks()
            conditions = self.prepare_conditions(guidance, captions, seen, fps)
            z = self._denoise(z_ref, conditions, guidance, windows, num_inference_steps, generator, step_end)
            clips.append(z if output_type == "latent" else self.decode_latents(z, decode_chunk_size).float())
            if clip < num_segments - 1:
                last = self.decode_latents(z[:, -1:]) if output_type == "latent" else clips[-1][:, -1:]
                current = self.video_processor.postprocess(last[:, 0].float(), "pil")
        frames = join_segments(clips)
        if output_type != "latent":
            frames = self.video_processor.postprocess_video(rearrange(frames, "b f c h w -> b c f h w"), output_type)
        self.maybe_free_model_hooks()
        return ImageToVideoOutput(frames, keyframes)

    def _denoise(
        self,
        z_ref: torch.Tensor,
        conditions: Conditions,
        guidance: Guidance,
        windows: Windows,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        step_end: Callable[[int, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor],
    ) -> torch.Tensor:
        """z0 (b, f, c, h, w) of clips with the key frames z_ref (b, c, h, w), from noise on."""
        device, (b, c, h, w) = self._execution_device, z_ref.shape
        set_timesteps(self.scheduler, num_inference_steps, device)
        eps = randn_tensor((b, windows.frames, c, h, w), generator=generator, device=device, dtype=torch.float32)
        z = self.noise_prior.initial(eps, z_ref) * self.scheduler.init_noise_sigma
        arguments, times = step_arguments(self.scheduler, generator), self.remapped_timesteps

        def denoise(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            told = t if times is None else float(np.interp(float(t), range(len(times)), times))
            return windows.average(lambda part: self.unet(part.to(self.unet.dtype), told, conditions).float(), z_t)

        with self.progress_bar(total=num_inference_steps) as bar:
            for step, t in enumerate(self.scheduler.timesteps):
                prediction = guidance(denoise, self.scheduler.scale_model_input(z, t), t)
                z = self.scheduler.step(prediction, t, z, **arguments).prev_sample
                z = step_end(step, t, {"latents": z, "prediction": prediction})
                # Solvers of second order visit a time twice; the bar counts steps.
                bar.update(min(1, num_inference_steps - bar.n))
        return z

    def prepare_conditions(
        self,
        guidance: Guidance,
        captions: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        image: Mapping[str, torch.Tensor],
        fps: float,
    ) -> Conditions:
        """Conditions of every evaluation that guidance needs, in its order, by one run of the condition encoder.

        Args:
            captions: `text`, and `motion_tokens` if the model reads them: of the captions, and what stands for them where guidance drops
                the text; each (b, n, d), the second also (1, n, d).
            image: `z_ref` (b, c, h, w), and what `encode_pixels` gives.

        Returns:
            Conditions of `(k b)` clips, k = number of `guidance.cases`.
        """
        cases, dtype, z_ref = guidance.cases, self.unet.dtype, image["z_ref"]
        read = {
            name: torch.cat([said if case.text else dropped.expand_as(said) for case in cases]).to(dtype)
            for name, (said, dropped) in captions.items()
        }
        seen = {name: repeat(x, "b ... -> (k b) ...", k=len(cases)).to(dtype) for name, x in image.items()}
        image_mask = torch.tensor([case.image for case in cases], device=z_ref.device).repeat_interleave(len(z_ref))
        rates = torch.full((len(cases) * len(z_ref),), fps, device=z_ref.device)
        return self.condition_encoder(**read, **seen, fps=rates, image_mask=image_mask)

    def check_motion_prompt(self, motion_prompt: str | Sequence[str] | None) -> None:
        """Refuses a motion prompt that nothing would read.

        Raises:
            UserError: the model reads one caption alone.
        """
        if motion_prompt is not None and not self.uses_motion_caption:
            raise UserError(
                "motion_prompt is given, and this model has no motion encoder; say the motion in the prompt"
            )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _LOG.warning(text)
