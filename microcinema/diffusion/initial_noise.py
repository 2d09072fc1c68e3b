"""Where sampling starts: at which time, and from which noise. Shapes: latents `b f c h w`, key frame `b c h w`."""

import torch
from diffusers import SchedulerMixin
from einops import rearrange, reduce
from torch import Tensor

from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.schedule import signal_and_noise, timesteps_from

_CUTOFF = 0.25  # of FrameInit's filter, as a share of the highest frequency
_STATIC_TIME = (
    0.85  # to which FrameInit diffuses the key frame, as a share of the training schedule: its authors' 850 of 1000
)


def initial_latents(
    kind: str, prior: NoisePrior, eps: Tensor, z_ref: Tensor, scheduler: SchedulerMixin, start_time: float
) -> Tensor:
    """`z_T` for `denoise`, which starts at `timesteps_from`, at time t, of independent standard noise.

    - `prior`: the noise prior's, see `NoisePrior.initial_noise`;
    - `analytic`: of all normal distributions with variance v I the one nearest to that of noisy clips (Analytic-Init, arXiv 2406.15735, eq. 6),

          z_t = sqrt(abar_t) m + sqrt(1 - abar_t) mu + sqrt(abar_t v + 1 - abar_t) L eps

      with mean m and variance v of clips. The authors have these from their data; ours are those of the key frame over its places;
    - `frame_init`: the low frequencies, over frames, height and width, are those of a still clip of the key frame, diffused to time 0.85 T
      (FrameInit, arXiv 2402.04324, section 4.2). By the same noise, ours, so that its variance stays what it was.
    """
    if kind == "prior" and start_time == 1:
        return prior.initial_noise(eps, z_ref)
    first, still = timesteps_from(scheduler, start_time)[0], rearrange(z_ref, "b c h w -> b 1 c h w")
    if kind == "analytic":
        signal, sigma = signal_and_noise(scheduler, first, eps)
        mean = reduce(still, "b 1 c h w -> b 1 c 1 1", "mean")
        variance = reduce((still - mean) ** 2, "b 1 c h w -> b 1 1 1 1", "mean")
        z = signal * mean + sigma * prior.mean(z_ref, eps.shape[1])
        z = z + (signal**2 * variance + sigma**2).sqrt() * prior.correlate(eps)
    elif kind == "frame_init":
        z = prior.noise(eps, z_ref)
        diffused_to = torch.tensor(_STATIC_TIME * (scheduler.config["num_train_timesteps"] - 1))
        signal, sigma = signal_and_noise(scheduler, diffused_to, eps)
        z = z + low_pass(signal * still + sigma * z - z)
    else:
        z = prior.initial_noise(eps, z_ref)
    # `denoise` multiplies by init_noise_sigma, which is the scheduler's scale at the first of all timesteps.
    return z / (scheduler.init_noise_sigma * scheduler.scale_model_input(torch.ones_like(z), first))


def low_pass(x: Tensor) -> Tensor:
    """The low frequencies of `b f c h w` over f, h and w, by the filter `exp(-d^2 / (2 0.25^2))`, d relative to the highest frequency."""
    axes = (1, 3, 4)
    frequencies = [2 * torch.fft.fftfreq(x.shape[axis], device=x.device) for axis in axes]
    distance = torch.stack(torch.meshgrid(*frequencies, indexing="ij")).square().sum(0)
    gain = rearrange(torch.exp(-distance / (2 * _CUTOFF**2)), "f h w -> f 1 h w")
    return torch.fft.ifftn(torch.fft.fftn(x, dim=axes) * gain, dim=axes).real
