"""The training objective: noisy latents, the prediction target, and weighted losses.

Shapes: b clips, f frames, c channels, h w latent grid. `z0`, `noise` and predictions are `b f c h w`, or any `b ...`; `t` is `(b,)` or a
scalar; `noise` is the `eps_hat` of the noise prior, not the independent `eps`.
"""

import torch
from diffusers import SchedulerMixin
from einops import rearrange, reduce

from microcinema.diffusion.schedule import signal_and_noise, snr
from microcinema.utils.errors import UserError


def add_noise(scheduler: SchedulerMixin, z0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """`z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps_hat` (arXiv 2006.11239, eq. 4)."""
    signal, sigma = signal_and_noise(scheduler, t, z0)
    return signal * z0 + sigma * noise


def target(scheduler: SchedulerMixin, z0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The target of the prediction at `z_t`, for the scheduler's prediction type.

    `epsilon`: eps_hat; `v_prediction`: `sqrt(abar_t) eps_hat - sqrt(1 - abar_t) z0` (arXiv 2202.00512); `sample`: z0.
    """
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return z0
    signal, sigma = signal_and_noise(scheduler, t, z0)
    return signal * noise - sigma * z0


def loss_weights(scheduler: SchedulerMixin, t: torch.Tensor, snr_gamma: float | None) -> torch.Tensor:
    """Min-SNR weight of every clip, `(b,)` (arXiv 2303.09556, section 3.4); ones if `snr_gamma` is None.

    The weight of the squared error of `z0` is `min(snr, gamma)`. The squared error of epsilon is `snr` times that of `z0`, and that of
    v is `snr + 1` times, so their weights are divided by these. A UserError if `snr_gamma` is not positive.
    """
    if snr_gamma is None:
        return torch.ones_like(t, dtype=torch.float32)
    if not snr_gamma > 0:
        raise UserError(f"snr_gamma is {snr_gamma}; use a number > 0 (5.0 in the paper), or null for equal weights")
    kind, ratio = scheduler.config["prediction_type"], snr(scheduler, t)
    if kind == "epsilon":
        return (snr_gamma / ratio).clamp(max=1)
    weight = ratio.clamp(max=snr_gamma)
    return weight if kind == "sample" else weight / (ratio + 1)


def motion_weights(z0: torch.Tensor, z_ref: torch.Tensor, strength: float) -> torch.Tensor:
    """Weights of the error at each latent position, `b 1 1 h w`: larger where the clip differs from its key frame.

        w = 1 + strength * min(1, max over frames of the mean over channels of |z0 - z_ref|)

    A small moving object contributes little to the mean error and is otherwise learned last. This is ours, from neither paper.
    `z0` is `b f c h w`, `z_ref` (of the key frames) `b c h w`.
    """
    change = reduce((z0 - rearrange(z_ref, "b c h w -> b 1 c h w")).abs(), "b f c h w -> b f h w", "mean")
    return 1 + strength * reduce(change, "b f h w -> b 1 1 h w", "max").clamp(max=1)


def squared_error(
    prediction: torch.Tensor, expected: torch.Tensor, weights: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Mean weighted squared error of each clip, `(b,)`, in at least float32."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return reduce(weights * (prediction.to(dtype) - expected.to(dtype)) ** 2, "b ... -> b", "mean")


def flow_loss(
    prediction: torch.Tensor, expected: torch.Tensor, valid: torch.Tensor, delta: float = 1e-3
) -> torch.Tensor:
    """Flow loss of PredictNet, `(b,)`, float32: the Charbonnier distance (robust L1) of flows, averaged over valid positions.

        mean of sqrt(|u - u*|^2 + delta^2) - delta

    Factorized-Dreamer (arXiv 2408.10119) supervises flow; this loss is our choice. It has the same weight at every noise level, since key
    frame and text tell of the motion even where noise hides it. A clip without valid positions has zero loss. The flows are
    `b f-1 2 h w`, `valid` is bool `b f-1 h w`.
    """
    distance = ((prediction.float() - expected.float()).square().sum(2) + delta**2).sqrt() - delta
    mask = valid.float()
    return (distance * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)
