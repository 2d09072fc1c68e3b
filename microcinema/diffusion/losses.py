"""The training objective: what is added to clean latents, what the network shall predict, and how errors are weighted.

Everywhere `z0`, `noise` and predictions are (b, f, c, h, w) or any (b ...), `t` is (b,) or a scalar, and `noise` is the
prior's `eps_hat`, not the independent `eps`.
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
    """What the network shall return at `z_t`, for the scheduler's prediction type.

    `epsilon`: eps_hat; `v_prediction`: `sqrt(abar_t) eps_hat - sqrt(1 - abar_t) z0` (arXiv 2202.00512); `sample`: z0.
    """
    kind = _prediction_type(scheduler)
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return z0
    signal, sigma = signal_and_noise(scheduler, t, z0)
    return signal * noise - sigma * z0


def predicted_sample(
    scheduler: SchedulerMixin, prediction: torch.Tensor, z_t: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """The `z0` that a prediction at `z_t` stands for: the inverse of `target`."""
    kind = _prediction_type(scheduler)
    if kind == "sample":
        return prediction
    signal, sigma = signal_and_noise(scheduler, t, z_t)
    if kind == "epsilon":
        return (z_t - sigma * prediction) / signal
    return signal * z_t - sigma * prediction


def loss_weights(scheduler: SchedulerMixin, t: torch.Tensor, snr_gamma: float | None) -> torch.Tensor:
    """Min-SNR weight of every clip, (b,); all ones without `snr_gamma` (arXiv 2303.09556, section 3.4).

    The weight on the error of `z0` is `min(snr, gamma)`. The squared error of epsilon is `snr` times that of `z0`, the
    one of v `snr + 1` times, so their weights are smaller by as much.
    """
    if snr_gamma is None:
        return torch.ones_like(t, dtype=torch.float32)
    if not snr_gamma > 0:
        raise UserError(
            f"snr_gamma is {snr_gamma}; use a number > 0 (the paper's 5.0), or null to weight all steps alike"
        )
    kind = _prediction_type(scheduler)
    ratio = snr(scheduler, t)
    if kind == "epsilon":
        return (snr_gamma / ratio).clamp(max=1)
    weight = ratio.clamp(max=snr_gamma)
    return weight if kind == "sample" else weight / (ratio + 1)


def motion_weights(z0: torch.Tensor, z_ref: torch.Tensor, strength: float) -> torch.Tensor:
    """Weights of the error at each place of the latents, (b, 1, 1, h, w): more where the clip departs from its key frame.

        w = 1 + strength * min(1, max over frames of the mean over channels of |z0 - z_ref|)

    A small moving object is a small part of the mean error and is otherwise learnt last. This is ours, from neither paper; 0 weighs
    all places alike.

    Args:
        z0: clean latents, (b, f, c, h, w).
        z_ref: of the key frames, (b, c, h, w).
    """
    change = reduce((z0 - rearrange(z_ref, "b c h w -> b 1 c h w")).abs(), "b f c h w -> b f h w", "mean")
    return 1 + strength * reduce(change, "b f h w -> b 1 1 h w", "max").clamp(max=1)


def squared_error(prediction: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Mean over each clip of the weighted squared error, (b,), in float32 at least."""
    kind = torch.promote_types(prediction.dtype, torch.float32)
    return reduce(weights * (prediction.to(kind) - wanted.to(kind)) ** 2, "b ... -> b", "mean")


def flow_loss(prediction: torch.Tensor, wanted: torch.Tensor, valid: torch.Tensor, delta: float = 1e-3) -> torch.Tensor:
    """PredictNet's loss of every clip, (b,), float32 (arXiv 2408.10119, our reading): the robust L1 distance of flows in their valid places.

        mean over valid places of sqrt(|u - u*|^2 + delta^2) - delta

    The Charbonnier penalty is smooth at zero. It counts alike at every noise level: weighed by the signal's share `abar_t`, a clip of
    `experiment=sprites_factorized_dreamer` would count 0.08 on average, and where noise hides the motion, key frame and text still tell of it.
    A clip without a valid place has no loss.

    Args:
        prediction, wanted: (b, f-1, 2, h, w).
        valid: bool (b, f-1, h, w).
    """
    distance = ((prediction.float() - wanted.float()).square().sum(2) + delta**2).sqrt() - delta
    share = valid.float()
    return (distance * share).sum((1, 2, 3)) / share.sum((1, 2, 3)).clamp(min=1)


def _prediction_type(scheduler: SchedulerMixin) -> str:
    return scheduler.config["prediction_type"]
