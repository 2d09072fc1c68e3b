"""The conditions and the denoising loop of stage 2. Shapes: latents `b f c h w`, key frame `b c h w`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from einops import repeat

from microcinema.diffusion.guidance import Guidance, GuidedDenoiser
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.schedule import predicted_z0_gains, signal_and_noise, step_arguments, timesteps_from
from microcinema.models.conditioning import Conditions
from microcinema.models.unet2d import StepCache
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.long_video import Windows
from microcinema.utils.errors import UserError

CALLBACK_TENSORS = ("latents", "prediction", "z0")


@dataclass
class StepCallback:
    """A user's function that is called after every step, in the manner of diffusers.

    Args:
        pipeline: first argument of the function.
        function: called as `function(pipeline, step, t, tensors)`; may return new `latents` in a dictionary.
        tensor_inputs: names of the tensors that it gets, of `CALLBACK_TENSORS`: `z0` is the clip that the prediction stands for.

    Raises:
        UserError: an unknown tensor.
    """

    pipeline: Any
    function: Callable[..., dict[str, Any] | None] | None
    tensor_inputs: Sequence[str]

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.tensor_inputs) - set(CALLBACK_TENSORS)):
            raise UserError(f"there is no tensor '{unknown[0]}' for callbacks; there are {', '.join(CALLBACK_TENSORS)}")

    def __call__(self, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The latents with which the loop continues."""
        inputs = {name: tensors[name] for name in self.tensor_inputs}
        changes = self.function(self.pipeline, step, t, inputs) if self.function else None
        return (changes or {}).get("latents", tensors["latents"])


def prepare_conditions(
    unet: VideoUNet,
    guidance: Guidance,
    captions: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    image: Mapping[str, torch.Tensor],
    **numbers: float | None,
) -> Conditions:
    """Conditions of `(k b)` clips, for the k terms of the guidance in their order, by one call of `unet.encode`.

    Args:
        captions: `text`, and `motion_tokens` if the model uses them: embeddings (b, n, d) of the captions, and of what replaces
            them where guidance drops the text, (b, n, d) or (1, n, d).
        image: `z_ref` (b, c, h, w), and the output of `ImageToVideoPipeline.encode_pixels`.
        numbers: `fps`, `motion_score` and `keyframe_noise`; None: not told.
    """
    terms, z_ref = guidance.terms, image["z_ref"]
    tokens = {
        name: torch.cat([caption if term.text else null.expand_as(caption) for term in terms]).to(unet.dtype)
        for name, (caption, null) in captions.items()
    }
    images = {name: repeat(x, "b ... -> (k b) ...", k=len(terms)).to(unet.dtype) for name, x in image.items()}
    image_mask = torch.tensor([term.image for term in terms], device=z_ref.device).repeat_interleave(len(z_ref))
    each = {name: torch.full_like(image_mask, x, dtype=torch.float) for name, x in numbers.items() if x is not None}
    return unet.encode(**tokens, **images, **each, image_mask=image_mask)


def make_guidance(settings: Any) -> Guidance:
    """The guidance of resolved `SamplingSettings`."""
    return Guidance(
        text=settings.guidance_scale,
        image=settings.image_guidance_scale,
        interval=settings.guidance_interval,
        reuse=settings.guidance_reuse,
        rescale=settings.guidance_rescale,
        apg_eta=settings.apg_eta,
        apg_norm_threshold=settings.apg_norm_threshold,
        apg_momentum=settings.apg_momentum,
    )


def _network_times(timesteps: torch.Tensor, remapped: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """What the network gets for each step: a tensor, since a number is a constant to torch.compile, which would make a graph of each."""
    if remapped is None:
        return timesteps
    interpolated = np.interp(timesteps.cpu(), range(len(remapped)), remapped)
    return torch.from_numpy(interpolated).to(device, torch.float32)


def _make_denoiser(
    unet: VideoUNet, conditions: Conditions, clips: int, device: str, windows: Windows, cache_interval: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The network by windows, once a step: of the latents of as many clips as the conditions are of, or of the last ones alone."""
    steps, caches = count(), [StepCache() for _ in windows.slices] if cache_interval > 1 else []
    # Under autocast, as in validation, only the network runs in low precision.
    autocast = torch.autocast(device, enabled=torch.is_autocast_enabled(device))

    def denoiser(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if next(steps) % cache_interval == 0:
            for cache in caches:
                cache.features = None
        known = conditions if len(z_t) == clips else conditions.last(len(z_t))
        of_windows = iter(caches)

        def predict(window: torch.Tensor) -> torch.Tensor:
            return unet(window.to(unet.dtype), t, known, *islice(of_windows, 1)).float()

        with autocast:
            return windows.average(predict, z_t)

    return denoiser


def denoise(
    unet: VideoUNet,
    scheduler: SchedulerMixin,
    z_T: torch.Tensor,
    prior: NoisePrior,
    z_ref: torch.Tensor,
    conditions: Conditions,
    guidance: Guidance,
    windows: Windows,
    remapped_timesteps: torch.Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None,
    step_end: StepCallback,
    bar: Any,
    cache_interval: int = 1,
    start_time: float = 1.0,
) -> torch.Tensor:
    """z0 (b, f, c, h, w) of initial noise z_T, along the timesteps that the scheduler has been set to, from `start_time` on.

    With a prior `eps_hat = L eps + mu` the network knows `z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps_hat`. The scheduler is shown

        u_t = L^-1 (z_t - sqrt(1 - abar_t) mu) = sqrt(abar_t) L^-1 z0 + sqrt(1 - abar_t) eps

    which is plain diffusion, with the network's prediction changed alike. So every scheduler is right as it is, also one that adds
    noise of its own; for others, whose steps are linear, nothing changes.

    Args:
        z_T: at unit variance (b, f, c, h, w), see `initial_latents`.
        prior: of training.
        z_ref: latents of the key frame (b, c, h, w).
        conditions: of `(k b)` clips, for the k terms of the guidance.
        remapped_timesteps: input of the network for every step of the training schedule, (t,); None: the step itself.
        generator: of schedulers that add noise.
        bar: progress bar over steps (tqdm).
        cache_interval: of so many steps the first computes the deep features of the network, and the others take them over.
    """
    timesteps = timesteps_from(scheduler, start_time)
    mean, first = prior.mean(z_ref, z_T.shape[1]), timesteps[0]
    scale = scheduler.scale_model_input(torch.ones_like(mean), first)  # not 1 for schedulers in terms of sigma
    z = z_T * scheduler.init_noise_sigma - signal_and_noise(scheduler, first, z_T)[1] * mean / scale
    arguments, device = step_arguments(scheduler, generator), z_T.device.type
    times = _network_times(timesteps, remapped_timesteps, z.device)
    denoiser = _make_denoiser(unet, conditions, len(guidance.terms) * len(z), device, windows, cache_interval)
    guided = GuidedDenoiser(guidance, denoiser, len(times))
    for step, (t, t_model) in enumerate(zip(timesteps, times, strict=True)):
        with torch.autocast(device, enabled=False):
            # Here z is L u, the latents without their share of the prior's mean.
            signal, sigma = signal_and_noise(scheduler, t, z)
            z_t = scheduler.scale_model_input(z, t) + sigma * mean
            of_latents, of_prediction = predicted_z0_gains(scheduler, t, z)
            prediction = guided(z_t, t_model, (of_latents, of_prediction))
            share: Any = {"epsilon": 1.0, "v_prediction": signal, "sample": 0.0}[scheduler.config["prediction_type"]]
            plain = prior.whiten(prediction - share * mean)
            z = prior.correlate(scheduler.step(plain, t, prior.whiten(z), **arguments).prev_sample)
        tensors = {"latents": z, "prediction": prediction}
        if "z0" in step_end.tensor_inputs:
            tensors["z0"] = of_latents * z_t + of_prediction * prediction
        z = step_end(step, t, tensors)
        # Second-order solvers visit a timestep twice; the bar counts steps.
        bar.update(min(1, bar.total - bar.n))
    return z
