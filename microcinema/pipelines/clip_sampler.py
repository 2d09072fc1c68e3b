"""The clips of one call of stage 2, each from key frames of its own. Shapes: latents `b f c h w`, key frame `b c h w`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from einops import repeat

from microcinema.config.sampling import SamplingSettings
from microcinema.data.keyframe_places import place_keyframes
from microcinema.diffusion.guidance import Guidance
from microcinema.diffusion.initial_noise import initial_latents
from microcinema.diffusion.schedule import timesteps_from
from microcinema.pipelines.denoise import StepCallback, denoise, prepare_conditions
from microcinema.pipelines.keyframe_places import interpolation_windows
from microcinema.pipelines.long_video import Windows

Latents = Mapping[int, torch.Tensor]
"""Scaled latents of key frames, `b c h w`, by their places in a clip."""
Pixels = Callable[[int], torch.Tensor]
"""Gives the pixels of the key frame at a place, `b 3 H W` in [-1, 1], for a model that uses them."""


@dataclass(frozen=True)
class ClipSampler:
    """Samples clips with the same captions and settings, one after the other, by an `ImageToVideoPipeline`.

    Args:
        settings: resolved.
        captions: of every video, see `prepare_conditions`.
        generator: draws the noise.
    """

    pipeline: Any
    settings: SamplingSettings
    guidance: Guidance
    captions: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    generator: torch.Generator | list[torch.Generator] | None
    step_end: StepCallback

    def __call__(self, windows: Windows, fps: float, keyframes: Latents, pixels: Pixels) -> torch.Tensor:
        """z0 (b, f, c, h, w) of clips.

        Args:
            windows: over the frames of a clip.
            keyframes, pixels: of every window, for each video, or each of fewer that are repeated.
        """
        pipeline, settings, device = self.pipeline, self.settings, self.pipeline._execution_device
        image = self._image_inputs(keyframes, pixels, windows.slices[0].stop)
        # With offloading the VAE would otherwise occupy the memory that the denoiser needs.
        pipeline.maybe_free_model_hooks()
        z_ref = image["z_ref"]
        shape = (len(z_ref), windows.frames, *z_ref.shape[1:])
        eps = randn_tensor(shape, generator=self.generator, device=device, dtype=torch.float32)
        numbers = {"fps": fps, "motion_score": pipeline.motion_score(settings.motion)}
        if pipeline.unet.options.keyframe_noise:
            numbers["keyframe_noise"] = 100 * settings.keyframe_noise
        if level := settings.keyframe_noise:  # the noise prior does not see it
            image["z_ref"] = z_ref + level * randn_tensor(z_ref.shape, self.generator, device, z_ref.dtype)
        conditions = prepare_conditions(pipeline.unet, self.guidance, self.captions, image, **numbers)
        scheduler, prior = pipeline.sampler(settings, device), replace(pipeline.noise_prior, gamma=settings.gamma)
        start = settings.start_time
        pipeline._num_timesteps = steps = len(timesteps_from(scheduler, start))
        with pipeline.progress_bar(total=min(steps, settings.num_inference_steps or 0)) as bar:
            z_T = initial_latents(settings.initial_noise, prior, eps, z_ref, scheduler, start)
            timesteps = pipeline.remapped_timesteps
            inputs = (prior, z_ref, conditions, self.guidance, windows, timesteps, self.generator, self.step_end, bar)
            return denoise(pipeline.unet, scheduler, z_T, *inputs, settings.cache_interval or 1, start)

    def interpolate(self, z: torch.Tensor) -> torch.Tensor:
        """A video of `settings.interpolate` times the frame rate: frames `b f c h w` unchanged, and others between neighbors, which are
        the key frames of clips; `b k(f-1)+1 c h w`."""
        factor, frames = self.settings.interpolate, z.shape[1]
        dense = z.new_zeros(len(z), factor * (frames - 1) + 1, *z.shape[2:])
        for window in interpolation_windows(frames, factor, self.pipeline.config["num_frames"]):
            keyframes = {factor * i: frame for i, frame in enumerate(z[:, window].unbind(1))}

            def pixels(place: int, keyframes: Latents = keyframes) -> torch.Tensor:
                return self.pipeline.decode_latents(keyframes[place][:, None])[:, 0].float()

            start, clip = factor * window.start, factor * (len(keyframes) - 1) + 1
            fps = factor * (self.settings.fps or 0.0)
            dense[:, start : start + clip] = self(Windows(clip, clip, 0), fps, keyframes, pixels)
        dense[:, ::factor] = z
        return dense

    def _image_inputs(self, keyframes: Latents, pixels: Pixels, frames: int) -> dict[str, torch.Tensor]:
        """What `VideoUNet.encode` gets of the key frames at places in clips of so many frames, for every video."""
        main = self.pipeline.trained_places.main(keyframes, frames)
        image = {"z_ref": keyframes[main]}
        if self.pipeline.uses_image_conditioning:
            image |= self.pipeline.encode_pixels(pixels(main))
        if self.pipeline.unet.options.keyframe_places:
            zero = torch.zeros_like(image["z_ref"])
            clips = torch.stack([keyframes.get(place, zero) for place in range(frames)], dim=1)
            places = torch.tensor([place in keyframes for place in range(frames)], device=clips.device)
            image["placed"] = place_keyframes(clips, places.expand(len(clips), -1))
        videos = len(self.captions["text"][0])
        return {name: repeat_to(x, videos) for name, x in image.items()}


def repeat_to(x: torch.Tensor, videos: int) -> torch.Tensor:
    """Each of a batch repeated, its copies one after the other."""
    return repeat(x, "b ... -> (b n) ...", n=videos // len(x))
