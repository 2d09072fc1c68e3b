"""Which samplers of diffusers are right for which prediction type, schedule and noise prior: writes docs/samplers.md.

    python -m scripts.recipes.sampler_table

The sampling loop of the pipeline runs with a denoiser in closed form, of clips that are normally distributed around their key frame.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from einops import einsum
from tqdm import tqdm

from microcinema.diffusion.guidance import Guidance
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.schedule import make_sampler, make_scheduler, set_timesteps, signal_and_noise
from microcinema.pipelines.denoise import StepCallback, denoise
from microcinema.pipelines.long_video import Windows
from microcinema.utils.errors import UserError
from microcinema.utils.logging import quieten_libraries

PAGE = Path(__file__).parents[2] / "docs" / "samplers.md"
FRAMES, SIDE = 4, 96  # frames of a clip; its pixels are SIDE^2 independent samples
STEPS, FEW_STEPS = 100, 50  # denoising steps; of LCM and TCD, which make no more
MEAN, DEVIATION, CORRELATION = 1.0, 0.5, 0.5  # of clips: the key frame, and around it for each pixel and between frames
STABLE_DIFFUSION = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SCHEDULES: dict[str, dict[str, Any]] = {
    "Stable Diffusion's": {},
    "zero terminal SNR": ZERO_SNR,
    "Factorized-Dreamer's": {**ZERO_SNR, "snr_shift": 2.0},
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
PRIORS = {
    "none": NoisePrior("none"),
    "appearance 0.03": NoisePrior("appearance", 0.03),
    "appearance 0.3": NoisePrior("appearance", 0.3),
    "mixed 1": NoisePrior("mixed", 1.0),
    "progressive 1": NoisePrior("progressive", 1.0),
}
_DETERMINISTIC = "DDIM EulerDiscrete DPMSolverMultistep UniPCMultistep DPMSolverSinglestep DEISMultistep HeunDiscrete KDPM2Discrete LMSDiscrete PNDM"
_STOCHASTIC = "DDPM EulerAncestralDiscrete KDPM2AncestralDiscrete SASolver TCD LCM"
SAMPLERS: dict[str, dict[str, Any]] = {
    **{name: {} for name in f"{_DETERMINISTIC} {_STOCHASTIC}".split()},
    "DPMSolverMultistep sde-dpmsolver++": {"algorithm_type": "sde-dpmsolver++"},
}


@dataclass(frozen=True)
class Figures:
    """Of sampled clips, as shares of what is true: mean and deviation; and the correlation between neighboring frames."""

    mean: float
    deviation: float
    correlation: float

    @property
    def verdict(self) -> str:
        """`right`, or what is wrong."""
        if not abs(self.mean - 1) < 0.015:
            return "wrong mean"
        if not abs(self.correlation - CORRELATION) < 0.1:
            return "wrong correlation"
        return "right" if 0.8 < self.deviation < 1.1 else "wrong deviation"

    def __str__(self) -> str:
        figures = f"{self.mean:.2f} {self.deviation:.2f} {self.correlation:.2f}"
        return figures if self.verdict == "right" else f"{figures} ({self.verdict})"


class GaussianDenoiser:
    """In the place of a network: what it would predict after perfect training on clips `N(m, S)` with noise `N(mu, C)`.

    The mean of `z0` given `z_t` is `m + a S (a^2 S + s^2 C)^-1 (z_t - a m - s mu)`, `a` and `s` being signal and noise.
    """

    dtype = torch.float64

    def __init__(self, training: SchedulerMixin, prior: NoisePrior, z_ref: torch.Tensor):
        self.training, self.m, self.mu = training, z_ref[:, None], prior.mean(z_ref, FRAMES)
        ones = torch.ones(FRAMES, FRAMES, dtype=self.dtype)
        self.clips = DEVIATION**2 * (CORRELATION * ones + (1 - CORRELATION) * torch.eye(FRAMES, dtype=self.dtype))
        self.noise = prior.covariance(FRAMES)

    def __call__(self, z_t: torch.Tensor, t: torch.Tensor, conditions: None) -> torch.Tensor:
        a, s = signal_and_noise(self.training, t, z_t)
        gain = (
            a.squeeze() * self.clips @ torch.linalg.inv(a.squeeze() ** 2 * self.clips + s.squeeze() ** 2 * self.noise)
        )
        z0 = self.m + einsum(gain, z_t - a * self.m - s * self.mu, "f g, b g c h w -> b f c h w")
        noise = (z_t - a * z0) / s
        targets = {"epsilon": noise, "v_prediction": a * noise - s * z0, "sample": z0}
        return targets[self.training.config["prediction_type"]]

    def start(self, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """`z_t` of clips. Noise alone would blame samplers for the signal that a schedule leaves in its last step."""
        a, s = signal_and_noise(self.training, t, eps)
        eps = eps - eps.mean(dim=(3, 4), keepdim=True)
        root = torch.linalg.cholesky(a.squeeze() ** 2 * self.clips + s.squeeze() ** 2 * self.noise)
        root = root @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(eps.reshape(FRAMES, -1))))
        return a * self.m + s * self.mu + einsum(root, eps, "f g, b g c h w -> b f c h w")


def measure(
    training: DDPMScheduler, sampler: SchedulerMixin, prior: NoisePrior, assumed: NoisePrior | None = None
) -> Figures:
    """What the sampling loop makes of the denoiser in closed form, if it assumes this prior, or another one than the denoiser's."""
    steps = FEW_STEPS if type(sampler).__name__ in ("LCMScheduler", "TCDScheduler") else STEPS
    generator, shape = torch.Generator().manual_seed(0), (1, FRAMES, 1, SIDE, SIDE)
    z_ref = torch.full((1, 1, SIDE, SIDE), MEAN, dtype=torch.float64)
    unet: Any = GaussianDenoiser(training, prior, z_ref)
    set_timesteps(sampler, steps)
    eps = torch.randn(shape, generator=generator, dtype=torch.float64)
    z_T = unet.start(sampler.timesteps[0], eps)
    windows, step_end = Windows(FRAMES, FRAMES), StepCallback(None, None, ())
    bar = SimpleNamespace(update=lambda n: None, total=steps, n=0)
    z = denoise(
        unet, sampler, z_T, assumed or prior, z_ref, None, Guidance(1.0, 1.0), windows, None, generator, step_end, bar
    )
    frames = z.reshape(FRAMES, -1)
    neighbors = torch.corrcoef(frames).diagonal(1)
    return Figures(frames.mean().item() / MEAN, frames.std(dim=1).mean().item() / DEVIATION, neighbors.mean().item())


def judge(schedule: str, prediction_type: str, sampler: str) -> str | dict[str, Figures]:
    """The figures of a sampler with each prior, or why it is refused."""
    name, _, _ = sampler.partition(" ")
    try:
        training = make_scheduler(STABLE_DIFFUSION, {**SCHEDULES[schedule], "prediction_type": prediction_type})
        made = [make_sampler(training, f"{name}Scheduler", **SAMPLERS[sampler]) for _ in PRIORS]
    except UserError as error:
        found = re.search(r"\((.*)\); use", str(error))
        return found[1] if found else str(error).partition(";")[0]
    return {prior: measure(training, one, PRIORS[prior]) for prior, one in zip(PRIORS, made, strict=True)}


def section(schedule: str, prediction_type: str, samplers: Mapping[str, Any] = SAMPLERS) -> list[str]:
    """Lines of the page for one training schedule: a table of the samplers that work, and why others are refused."""
    judged = {name: judge(schedule, prediction_type, name) for name in tqdm(samplers, f"{schedule}, {prediction_type}")}
    lines = [f"### {schedule} schedule, {prediction_type}", ""]
    if rows := {name: figures for name, figures in judged.items() if not isinstance(figures, str)}:
        lines += [f"| sampler | {' | '.join(PRIORS)} |", f"| --- |{' --- |' * len(PRIORS)}"]
        lines += [f"| {name} | {' | '.join(map(str, figures.values()))} |" for name, figures in rows.items()]
        lines.append("")
    refused: dict[str, list[str]] = {}
    for name, reason in judged.items():
        if isinstance(reason, str):
            refused.setdefault(reason.replace(f"{name}Scheduler", "it"), []).append(name)
    lines += [f"- Refused: {', '.join(names)} ({reason})." for reason, names in refused.items()]
    return [*lines, ""] if refused else lines


def page() -> str:
    """The page, which is its text and all sections."""
    text = PAGE.read_text(encoding="utf-8").partition("### ")[0]
    return text + "\n".join(line for name in SCHEDULES for kind in PREDICTION_TYPES for line in section(name, kind))


if __name__ == "__main__":
    quieten_libraries()
    PAGE.write_text(page(), encoding="utf-8")
