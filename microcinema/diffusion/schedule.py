"""Noise schedules: diffusers' schedulers set up for latents, and checks that sampling and training agree.

`abar` is alpha_bar, the cumulative signal; tensors over the steps of a schedule are `(t,)`.
"""

import inspect
import json
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers

from microcinema.utils.errors import UserError, check_choice, first_line

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
SUMMARY = ("num_train_timesteps", *_BETAS, "prediction_type")
# By default several schedulers clamp the predicted sample to [-1, 1], which is right for pixels and ruins latents.
_FOR_LATENTS = {"clip_sample": False, "thresholding": False}


def make_scheduler(base_config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> DDPMScheduler:
    """The training scheduler of a video model: the base's schedule with overrides, never clipping.

    Args:
        base_config: config of a diffusers scheduler of any class, of which betas and prediction type are used.
        overrides: settings by their names in diffusers, None for the base's; and `snr_shift`, see `shifted_betas`.

    Raises:
        UserError: no betas (flow matching), an unknown override or prediction type, or epsilon with zero terminal SNR.
    """
    overrides = {key: value for key, value in (overrides or {}).items() if value is not None}
    shift = overrides.pop("snr_shift", 1.0)
    if not {"beta_schedule", "trained_betas"} & set(base_config):
        raise UserError(f"'{base_config.get('_class_name')}' has no betas; use a base with a DDPM-like schedule")
    settings = {**overrides, **_FOR_LATENTS}
    scheduler, unused = DDPMScheduler.from_config(dict(base_config), **settings, return_unused_kwargs=True)
    if unknown := sorted(set(unused) & (set(overrides) - set(base_config))):
        raise UserError(f"unknown scheduler settings {unknown}; use the names of diffusers' DDPMScheduler")
    check_choice("prediction_type", scheduler.config.prediction_type, PREDICTION_TYPES)
    zero_snr = scheduler.config.rescale_betas_zero_snr or (scheduler.config.trained_betas or [0.0])[-1] == 1.0
    if zero_snr and scheduler.config.prediction_type == "epsilon":
        fault = "with zero terminal SNR the last step is pure noise, and says nothing of the clip to a model that predicts epsilon"
        raise UserError(f"{fault}; use prediction_type=v_prediction or sample, or rescale_betas_zero_snr=false")
    if shift == 1.0:
        return scheduler
    betas = shifted_betas(scheduler.alphas_cumprod, shift)
    # Stable Diffusion's samplers end at the noise level of step 0, which the shift makes visible; with this they end at zero.
    return DDPMScheduler.from_config({**scheduler.config, "set_alpha_to_one": True}, trained_betas=betas.tolist())


def schedule_summary(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The settings that decide the noise levels and the target of a training schedule."""
    config = make_scheduler(scheduler.config).config
    return {key: config[key] for key in SUMMARY if key in config}


def shifted_betas(abar: torch.Tensor, shift: float) -> torch.Tensor:
    """Betas of the schedule whose signal-to-noise ratio is `snr / shift^2` at every step (arXiv 2301.11093, section 3.1).

        abar' = abar / (abar + shift^2 (1 - abar)), exactly 0 where abar is 0

    Neighboring frames are redundant, so a clip needs more noise than an image to lose as much information: shift > 1. A UserError if the
    shift is not positive.
    """
    if not shift > 0:
        raise UserError(f"snr_shift is {shift}; use a number > 0, 1 for no shift")
    abar = abar.double()
    shifted = abar / (abar + shift**2 * (1 - abar))
    return 1 - shifted / torch.cat([torch.ones(1, dtype=torch.float64), shifted[:-1]])


def match_snr_timesteps(schedule: SchedulerMixin, reference: SchedulerMixin) -> torch.Tensor:
    """For every step of a schedule, the timestep at which the reference schedule has the same SNR, `(t,)`, float32.

    With these timesteps as its input, a network that was pretrained with the reference schedule sees noise levels that it knows. More
    noise than in the reference, such as zero signal, maps to its last timestep.
    """
    abars = (scheduler.alphas_cumprod.double() for scheduler in (schedule, reference))
    # The logarithm of 1 / SNR, which rises with t and is infinite at zero signal.
    new, old = ((torch.log1p(-abar) - abar.log()).numpy() for abar in abars)
    finite = np.isfinite(old)
    return torch.from_numpy(np.interp(new, old[finite], np.flatnonzero(finite))).float()


def check_keeps_prediction_type(schedule: SchedulerMixin, trained: str) -> None:
    """Refuses a training schedule with another prediction type than `trained`, which the frozen layers were trained for.

    Noise levels may change, see `match_snr_timesteps`.
    """
    if (value := schedule.config["prediction_type"]) != trained:
        fault = f"diffusion.scheduler.prediction_type is {value}, but the frozen layers were trained with {trained}"
        raise UserError(f"{fault}; set diffusion.scheduler.prediction_type={trained}, or trainable_parameters=all")


def make_sampler(training: SchedulerMixin, name: str = "DDIMScheduler", **overrides: Any) -> SchedulerMixin:
    """A scheduler of diffusers, by class name, that samples a model trained with `training`. A UserError if diffusers has no such scheduler,
    or it cannot sample such a model; see `check_sampler`."""
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        # If a package is missing, diffusers has a placeholder of that name.
        packages = ", ".join(getattr(kind, "_backends", ()))
        missing = f" (it needs {packages})" if packages else ""
        raise UserError(f"diffusers has no scheduler '{name}' here{missing}; use for example DDIMScheduler")
    sampler, fault = _sampler_and_fault(training, name, overrides)
    if fault:
        raise _cannot_sample(training, name, fault)
    return sampler


def check_sampler(training: SchedulerMixin, sampling: SchedulerMixin) -> None:
    """Refuses a scheduler that cannot sample a model of this training schedule.

    The schedules must agree, and a trial must give the right numbers: some schedulers of diffusers run from data to noise, need more
    than a prediction, do not support every prediction type, or divide by the signal of the last step, which may be zero.
    """
    check_schedules_agree(training, sampling)
    if fault := trial_fault(sampling):
        raise _cannot_sample(training, type(sampling).__name__, fault)


def right_samplers(training: SchedulerMixin) -> list[str]:
    """The schedulers of diffusers that are right for a model of this training schedule, by class name."""
    trials = {kind.name: _sampler_and_fault(training, kind.name, {}) for kind in KarrasDiffusionSchedulers}
    return sorted(name for name, (_, fault) in trials.items() if not fault)


def trial_fault(sampling: SchedulerMixin, steps: int | None = None, start_time: float = 1.0) -> str:
    """Why a sampler's results are wrong; empty if they are right. Tried once for each class, config, number of steps (None: 20) and start.

    The trial samples 8192 independent numbers of mean 1 and deviation 0.5, whose denoiser has a closed form, from their noisy state
    at the first timestep. Their mean must be right, whatever the number of steps. With few steps every sampler loses deviation, so
    that at least half of it must be left after 20.
    """
    if "noise_sampler_seed" in sampling.config:
        return "it draws noise from its own generator, not from the seed's"
    steps = steps or min(20, sampling.config["num_train_timesteps"] // 2)
    kind: Any = type(sampling)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the numbers are judged, whatever scipy says of them
        return _trial_fault(kind, json.dumps(dict(sampling.config), default=str), steps, start_time)


@cache
def _trial_fault(kind: Any, config: str, steps: int, start_time: float) -> str:
    sampler, generator = kind.from_config(json.loads(config)), torch.Generator().manual_seed(0)
    mean, deviation = 1.0, 0.5
    prediction_type, arguments = sampler.config["prediction_type"], step_arguments(sampler, generator)
    eps = torch.randn(1, 1, 1, 1, 8192, generator=generator, dtype=torch.float32)
    try:
        sampler.set_timesteps(steps)
        if not sampler.timesteps.isfinite().all():
            return "its timesteps are not finite"
        timesteps = timesteps_from(sampler, start_time)
        signal = signal_and_noise(sampler, timesteps[0], eps)[0]
        z = signal * mean + (1 - signal**2 * (1 - deviation**2)) ** 0.5 * eps
        z = z * sampler.init_noise_sigma if start_time == 1 else z / sampler.scale_model_input(eps / eps, timesteps[0])
        for t in timesteps:
            z_t, (signal, sigma) = sampler.scale_model_input(z, t), signal_and_noise(sampler, t, z)
            z0 = mean + signal * deviation**2 / (signal**2 * deviation**2 + sigma**2) * (z_t - signal * mean)
            eps = (z_t - signal * z0) / sigma
            prediction = {"epsilon": eps, "v_prediction": signal * eps - sigma * z0, "sample": z0}[prediction_type]
            z = sampler.step(prediction, t, z, **arguments).prev_sample
    except (TypeError, ValueError, IndexError, NotImplementedError) as error:
        return first_line(error)
    if not z.isfinite().all():
        return "its results are not finite"
    ratio = z.std().item() / deviation
    if abs(z.mean().item() - mean) <= 0.05 and (0.5 if steps >= 20 else 0.0) <= ratio <= 1.5:
        return ""
    return f"in a trial the mean became {z.mean():.2f} times and the deviation {ratio:.2f} times what it should be"


def set_timesteps(
    scheduler: SchedulerMixin, steps: int, device: torch.device | None = None, start_time: float = 1.0
) -> SchedulerMixin:
    """The scheduler with its timesteps set; a number of steps, or a start, with which it is not right (see `trial_fault`) is a UserError.

    Sampling starts from noise. If the first timestep is far from that, as with few steps of leading or linear spacing, it is a copy with
    trailing spacing (arXiv 2305.08891, section 3.3). Far is a signal `sqrt(abar_t)` more than 0.1 above that of the last training step,
    which moves the mean of the trial by 0.05.
    """
    name, trained = type(scheduler).__name__, scheduler.config["num_train_timesteps"]
    try:
        scheduler.set_timesteps(steps, device=device)
    except ValueError as error:
        raise UserError(f"{name} cannot make {steps} steps ({error}); ask for fewer") from None
    if scheduler.timesteps.max() > trained - 1:  # by an offset, with as many steps as in training
        raise UserError(f"{name} cannot make {steps} steps of the {trained} in training; ask for fewer")
    ends = torch.stack([scheduler.timesteps[0].cpu().float(), torch.tensor(trained - 1.0)])
    first, last = signal_and_noise(scheduler, ends, torch.ones(2))[0].tolist()
    if first - last > 0.1 and scheduler.config.get("timestep_spacing", "trailing") != "trailing":
        trailing = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
        return set_timesteps(trailing, steps, device, start_time)
    if fault := trial_fault(scheduler, steps, start_time):
        start = "" if start_time == 1 else f" from start_time={start_time:g}"
        raise UserError(f"{name} does not work with {steps} steps{start} ({fault}); ask for another number")
    return scheduler


def timesteps_from(scheduler: SchedulerMixin, start_time: float) -> torch.Tensor:
    """The timesteps of a scheduler, which is told where they begin, that are not later than this share of the training schedule; a UserError
    if none is left."""
    late = int((scheduler.timesteps > start_time * (scheduler.config["num_train_timesteps"] - 1)).sum())
    late = -(-late // scheduler.order) * scheduler.order  # second-order solvers visit each timestep twice
    if late >= len(scheduler.timesteps):
        raise UserError(f"start_time={start_time:g} leaves no step of {len(scheduler.timesteps)}; use a later one")
    if late and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(late)
    return scheduler.timesteps[late:]


def step_arguments(scheduler: SchedulerMixin, generator: Any) -> dict[str, Any]:
    """Further arguments of `scheduler.step`: the generator, if the scheduler draws noise."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def _sampler_and_fault(training: SchedulerMixin, name: str, overrides: Mapping[str, Any]) -> tuple[Any, str]:
    """A scheduler of diffusers for this training schedule, None if it cannot be made; and why it is wrong, or nothing."""
    try:
        sampler = getattr(diffusers, name).from_config(training.config, **{**overrides, **_FOR_LATENTS})
        check_schedules_agree(training, sampler)
    except (ImportError, TypeError, ValueError, UserError) as error:
        return None, first_line(error).partition("; ")[0]  # without its advice
    return sampler, trial_fault(sampler)


def _cannot_sample(training: SchedulerMixin, name: str, reason: str) -> UserError:
    return UserError(f"{name} does not sample this model ({reason}); use {', '.join(right_samplers(training))}")


def alphas_cumprod(scheduler: SchedulerMixin) -> torch.Tensor:
    """`abar_t` of every training step, `(t,)`; a scheduler without (flow matching) is a UserError."""
    abar = getattr(scheduler, "alphas_cumprod", None)
    if abar is None:
        raise UserError(f"{type(scheduler).__name__} has no alphas_cumprod; use a scheduler with a DDPM-like schedule")
    return abar


def snr(scheduler: SchedulerMixin, t: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio `abar_t / (1 - abar_t)` at steps `t`, same shape as `t`, on its device."""
    abar = alphas_cumprod(scheduler).to(t.device)[t]
    return abar / (1 - abar)


def signal_and_noise(
    scheduler: SchedulerMixin, t: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sqrt(abar_t)` and `sqrt(1 - abar_t)` for `t`, `(b,)` or a scalar, shaped to multiply `like`, `b ...`; at least float32.
    Between two steps, which samplers ask for as well, `abar` is interpolated."""
    abar = alphas_cumprod(scheduler).to(like.device, torch.promote_types(like.dtype, torch.float32))
    t, before = t.to(like.device), t.to(like.device).long()
    after = (before + 1).clamp(max=len(abar) - 1)
    abar = torch.lerp(abar[before], abar[after], (t - before).to(abar)).reshape(-1, *[1] * (like.ndim - 1))
    return abar**0.5, (1 - abar) ** 0.5


def predicted_z0_gains(scheduler: SchedulerMixin, t: torch.Tensor, like: torch.Tensor) -> tuple[Any, Any]:
    """Factors of `z_t` and of the prediction in the clip that a prediction stands for: `z0 = a z_t + b prediction`."""
    signal, sigma = signal_and_noise(scheduler, t, like)
    gains = {"epsilon": (1 / signal, -sigma / signal), "v_prediction": (signal, -sigma), "sample": (0.0, 1.0)}
    return gains[scheduler.config["prediction_type"]]


def check_schedules_agree(training: SchedulerMixin, sampling: SchedulerMixin) -> None:
    """Refuses a sampler whose noise levels or prediction type differ from those in training; names both values."""
    name, advice = type(sampling).__name__, "create it with from_config of the model's scheduler"
    for key in ("num_train_timesteps", "prediction_type"):
        trained, sampled = training.config.get(key), sampling.config.get(key)
        if trained != sampled:
            raise UserError(f"the model was trained with {key} {trained}, but {name} has {sampled}; {advice}")
    trained, sampled = alphas_cumprod(training).cpu().double(), alphas_cumprod(sampling).cpu().double()
    if not torch.allclose(trained, sampled, rtol=1e-4, atol=1e-7):
        ends = f"the model was trained down to alpha_bar {trained[-1]:.6f}, but {name} goes to {sampled[-1]:.6f}"
        raise UserError(f"{ends}; {advice}")
    if clipping := [key for key in _FOR_LATENTS if sampling.config.get(key)]:
        raise UserError(f"{name} clips the predicted sample, which ruins latents; set {clipping[0]}=False")
