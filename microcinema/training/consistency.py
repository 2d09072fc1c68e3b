"""Consistency distillation: of a video model of many steps, the teacher, comes one of few (LCM, arXiv 2310.04378; AnimateLCM, 2402.00769).

The times of diffusion are cut into phases (Phased Consistency Model, arXiv 2405.18407). The student learns where a path of the guided
teacher's ODE leaves its phase: `f(z_t, t)`, a step of DDIM by the student from t to the end of the phase, is constant along the path. With one
phase, which ends at the clip, that is LCM. The noise prior is in z_t; an ODE draws no noise.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin
from einops import reduce

from microcinema.config import schema
from microcinema.diffusion.guidance import Guidance
from microcinema.diffusion.losses import add_noise
from microcinema.diffusion.schedule import make_sampler, predicted_z0_gains, schedule_summary, signal_and_noise
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.saving import load_pipeline
from microcinema.training import loss
from microcinema.training.resume import PIPELINE
from microcinema.utils.errors import UserError
from microcinema.utils.fingerprint import differences
from microcinema.utils.hashing import hash_networks


def few_step_sampler(training: SchedulerMixin, num_ode_steps: int, phases: int) -> SchedulerMixin:
    """The sampler of a student that learned from n steps of the teacher, at `i k - 1`, i = n ... 1, k = T / n, and then to no noise: of one phase
    LCM's, of several one whose steps are the phases. A UserError if n divides no T, or the phases do not divide n."""
    total = training.config["num_train_timesteps"]
    if total % num_ode_steps or num_ode_steps % phases:
        fault = f"objective.num_ode_steps is {num_ode_steps}, with {phases} phases and {total} times of diffusion"
        raise UserError(f"{fault}; use a number that divides the times, and that the phases divide")
    if phases == 1:
        return make_sampler(training, "LCMScheduler", original_inference_steps=num_ode_steps)
    return make_sampler(training, timestep_spacing="trailing", set_alpha_to_one=True)


@dataclass(frozen=True)
class Consistency:
    """The objective of a `LossConfig`: the distance between f at both ends of a step of the teacher, each phase's in units of the z0 at its start.

    The target is the student's own f without gradient (arXiv 2310.14189, section 3.2), not LCM's with averaged weights. Guidance is one, and
    becomes part of the student, which is sampled without; LCM's has a range of scales and tells the network which.

    Args:
        teacher: frozen.
        guidance: of the teacher.
        num_ode_steps, phases: see `few_step_sampler`.
        huber_c: c of the distance `sqrt(d^2 + c^2) - c` of two numbers.
    """

    teacher: loss.Denoiser
    guidance: Guidance
    num_ode_steps: int
    phases: int
    huber_c: float

    def __call__(
        self, denoiser: loss.Denoiser, batch: loss.Batch, noise: loss.TrainingNoise, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `loss.Objective`."""
        *given, weights = rest
        found, expected, flow = self.pair(denoiser, batch, noise, *given)
        distance = ((found - expected) ** 2 + self.huber_c**2).sqrt() - self.huber_c
        return reduce(weights * distance, "b ... -> b", "mean"), flow

    def pair(
        self,
        denoiser: loss.Denoiser,
        batch: loss.Batch,
        noise: loss.TrainingNoise,
        null: loss.NullConditioning,
        config: loss.LossConfig,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """f at the teacher's last time that is not before `noise.t`, and its target, both (b, f, c, h, w) and divided by the share of z0 in f at the
        start of the phase; and PredictNet's flow, or None."""
        steps, given = self.num_ode_steps // self.phases, (batch, noise, null, config)
        times = config.scheduler.config["num_train_timesteps"] // self.num_ode_steps
        t = (noise.t // times + 1).clamp(max=self.num_ode_steps)  # in steps of the teacher; 0: no noise
        end = (t - 1) // steps * steps
        at_t, at_s, at_end, at_start = (_Levels(i * times, batch.latents, config) for i in (t, t - 1, end, end + steps))
        z_t = add_noise(config.scheduler, batch.latents, config.noise(batch, noise), at_t.time)
        with torch.no_grad():
            z_s = at_t.step(self._guided(z_t, at_t.time, *given), z_t, at_s)
            expected = at_s.step(loss.evaluate(denoiser, z_s, at_s.time, *given)[0], z_s, at_end)
            share = at_end.signal - at_end.sigma * at_start.signal / at_start.sigma
        prediction, flow = loss.evaluate(denoiser, z_t, at_t.time, *given)
        return at_t.step(prediction, z_t, at_end) / share, expected / share, flow

    def _guided(self, z_t: torch.Tensor, t: torch.Tensor, *given: Any) -> torch.Tensor:
        batch, noise, null, config = given
        prediction: Any = 0.0
        for term in self.guidance.terms:
            masks = {"text_mask": noise.text_mask & term.text, "image_mask": noise.image_mask & term.image}
            output, _ = loss.evaluate(self.teacher, z_t, t, batch, replace(noise, **masks), null, config)
            prediction = prediction + term.factor * output
        return prediction


class _Levels:
    """Signal and noise of a batch after so many times of diffusion, (b,); after none, where the schedule still has noise, there is none."""

    def __init__(self, after: torch.Tensor, like: torch.Tensor, config: loss.LossConfig) -> None:
        self.time, self.config = (after - 1).clamp(min=0), config
        self.after = after.reshape(-1, 1, 1, 1, 1)
        signal, sigma = signal_and_noise(config.scheduler, self.time, like)
        self.signal, self.sigma = signal.where(self.after > 0, 1.0), sigma.where(self.after > 0, 0.0)

    def step(self, prediction: torch.Tensor, z: torch.Tensor, to: "_Levels") -> torch.Tensor:
        """A step of DDIM (arXiv 2010.02502, eq. 12) by what was predicted here; at its end it is z itself."""
        gains = predicted_z0_gains(self.config.scheduler, self.time, z)
        z0 = gains[0] * z + gains[1] * prediction
        stepped = to.signal * z0 + to.sigma * (z - self.signal * z0) / self.sigma
        return torch.where(self.after == to.after, z, stepped)


def load_objective(
    settings: schema.Consistency, pipeline: ImageToVideoPipeline, accelerator: Accelerator
) -> Consistency:
    """The objective of a run that trains this pipeline, its teacher whole and in float32 on each device. A UserError if the teacher cannot be
    opened, or differs from the student in more than its network."""
    teacher = load_pipeline(settings.teacher)
    if changed := differences(in_common(pipeline), in_common(teacher)):
        fault = f"objective.teacher '{settings.teacher}' cannot teach this model: {'; '.join(changed)}"
        raise UserError(f"{fault}; train with the teacher's settings")
    network = loss.TrainableModel(teacher.unet.to(accelerator.device))

    def denoiser(*args: torch.Tensor, **kwargs: torch.Tensor) -> tuple[torch.Tensor, None]:
        with accelerator.autocast():
            return network(*args, **kwargs)[0].float(), None

    scales = {name: getattr(settings, name) for name in ("guidance_scale", "image_guidance_scale")}
    guidance = Guidance(*(teacher.config[name] if scale is None else scale for name, scale in scales.items()))
    return Consistency(denoiser, guidance, settings.num_ode_steps, settings.phases, settings.huber_c)


def in_common(pipeline: ImageToVideoPipeline) -> dict[str, Any]:
    """What teacher and student must agree on: clips, noise, and every encoder."""
    values = {name: pipeline.config[name] for name in PIPELINE if name != "fps"}
    values |= {"pixels": pipeline.uses_keyframe_pixels, "keyframe_places": pipeline.unet.options.keyframe_places}
    values |= schedule_summary(pipeline.training_scheduler)
    return values | hash_networks({name: part for name, part in pipeline.components.items() if name != "unet"})
