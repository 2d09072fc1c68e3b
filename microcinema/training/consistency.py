"""Consistency distillation: of a video model of many steps, the teacher, comes one of few (LCM, arXiv 2310.04378; AnimateLCM, 2402.00769).

The student learns `f(z_t, t) = c_skip(t) z_t + c_out(t) z0`, with the z0 that its prediction stands for, c_skip(0) = 1 and c_out(0) = 0. Along
a path of the guided teacher's ODE it is constant, so it is the end of that path. The noise prior is in z_t; an ODE draws no noise.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import LCMScheduler, SchedulerMixin
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


def few_step_sampler(training: SchedulerMixin, num_ode_steps: int) -> LCMScheduler:
    """The sampler of a student that learned from n steps of the teacher, at `i k - 1`, i = n ... 1, k = T // n, and then to no noise."""
    return make_sampler(training, "LCMScheduler", original_inference_steps=num_ode_steps)


@dataclass(frozen=True)
class Consistency:
    """The objective of a `LossConfig`: the distance between f at both ends of a step of the teacher.

    The target is the student's own f without gradient (arXiv 2310.14189, section 3.2), not LCM's with averaged weights. Guidance is one, and
    becomes part of the student, which is sampled without; LCM's has a range of scales and tells the network which.

    Args:
        teacher: frozen.
        guidance: of the teacher.
        sampler: see `few_step_sampler`.
        huber_c: c of the distance `sqrt(d^2 + c^2) - c` of two numbers.
    """

    teacher: loss.Denoiser
    guidance: Guidance
    sampler: LCMScheduler
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
        """f at the teacher's last time that is not before `noise.t`, its target, both (b, f, c, h, w), and PredictNet's flow, or None."""
        steps, given = self.sampler.config["original_inference_steps"], (batch, noise, null, config)
        skip = self.sampler.config["num_train_timesteps"] // steps
        t = (noise.t // skip + 1).clamp(max=steps) * skip - 1
        s = (t - skip).clamp(min=0)  # at 0 there is no noise
        z_t = add_noise(config.scheduler, batch.latents, config.noise(batch, noise), t)
        with torch.no_grad():
            z_s = self._ode_step(z_t, t, s, *given)
            expected = self._function(loss.evaluate(denoiser, z_s, s, *given)[0], z_s, s, config)
        prediction, flow = loss.evaluate(denoiser, z_t, t, *given)
        return self._function(prediction, z_t, t, config), expected, flow

    def _function(
        self, prediction: torch.Tensor, z: torch.Tensor, t: torch.Tensor, config: loss.LossConfig
    ) -> torch.Tensor:
        scales = self.sampler.get_scalings_for_boundary_condition_discrete(t)
        c_skip, c_out = (torch.as_tensor(scale).reshape(-1, 1, 1, 1, 1) for scale in scales)
        return c_skip * z + c_out * _z0(prediction, z, t, config)

    def _ode_step(self, z_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor, *given: Any) -> torch.Tensor:
        """One step of DDIM (arXiv 2010.02502, eq. 12) from `t` to `s`, (b,), by the guided teacher."""
        batch, noise, null, config = given
        prediction: Any = 0.0
        for term in self.guidance.terms:
            masks = {"text_mask": noise.text_mask & term.text, "image_mask": noise.image_mask & term.image}
            output, _ = loss.evaluate(self.teacher, z_t, t, batch, replace(noise, **masks), null, config)
            prediction = prediction + term.factor * output
        z0, (signal, sigma) = _z0(prediction, z_t, t, config), signal_and_noise(config.scheduler, t, z_t)
        z_s = add_noise(config.scheduler, z0, (z_t - signal * z0) / sigma, s)
        return torch.where((s == 0).reshape(-1, 1, 1, 1, 1), z0, z_s)


def _z0(prediction: torch.Tensor, z_t: torch.Tensor, t: torch.Tensor, config: loss.LossConfig) -> torch.Tensor:
    gains = predicted_z0_gains(config.scheduler, t, z_t)
    return gains[0] * z_t + gains[1] * prediction


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
    return Consistency(
        denoiser, guidance, few_step_sampler(pipeline.training_scheduler, settings.num_ode_steps), settings.huber_c
    )


def in_common(pipeline: ImageToVideoPipeline) -> dict[str, Any]:
    """What teacher and student must agree on: clips, noise, and every encoder."""
    values = {name: pipeline.config[name] for name in PIPELINE if name != "fps"}
    values |= {"pixels": pipeline.uses_keyframe_pixels, "keyframe_places": pipeline.unet.options.keyframe_places}
    values |= schedule_summary(pipeline.training_scheduler)
    return values | hash_networks({name: part for name, part in pipeline.components.items() if name != "unet"})
