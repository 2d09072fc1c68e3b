"""One training step's mathematics: what is random about a clip, and the loss of a batch. Pure functions of their arguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from diffusers import SchedulerMixin
from einops import rearrange
from torch import nn

from microcinema.data.keyframe_index import keyframe_index
from microcinema.data.optical_flow import Flow
from microcinema.diffusion.losses import add_noise, flow_loss, loss_weights, motion_weights, squared_error, target
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.rng import generator
from microcinema.models.conditioning import ConditionEncoder
from microcinema.models.predict_net import PredictNet
from microcinema.models.video_unet import VideoUNet


@dataclass(frozen=True)
class Batch:
    """Clips as the networks see them, all on one device.

    Attributes:
        latents: scaled VAE latents z0, (b, f, c, h, w), float32.
        text: embeddings of the captions, (b, n, d).
        fps: frames per second, (b,).
        numbers: place of each clip in the global order (training/order.py).
        image: what the condition encoder reads of the key frames beside their latents: `image_tokens`, `pixels`, or nothing.
        motion_tokens: of the motion captions, (b, k, e), or None.
        flow: of the teacher, on the latent grid, or None.
    """

    latents: torch.Tensor
    text: torch.Tensor
    fps: torch.Tensor
    numbers: Sequence[int]
    image: Mapping[str, torch.Tensor] = field(default_factory=dict)
    motion_tokens: torch.Tensor | None = None
    flow: Flow | None = None


@dataclass(frozen=True)
class TrainingNoise:
    """Everything random about the clips of a batch.

    Attributes:
        noise: independent standard noise eps, (b, f, c, h, w).
        t: diffusion steps, (b,), integers.
        text_mask, image_mask: False where that condition is dropped, (b,), bool.
    """

    noise: torch.Tensor
    t: torch.Tensor
    text_mask: torch.Tensor
    image_mask: torch.Tensor

    def to(self, device: torch.device) -> "TrainingNoise":
        """The same draws on another device."""
        return TrainingNoise(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


@dataclass(frozen=True)
class Objective:
    """What a clip is trained on. The prediction type is the scheduler's.

    Attributes:
        scheduler: the training schedule.
        prior: how the noise of a clip is made.
        keyframe_position: which frame is the key frame: first, center or an index.
        snr_gamma: min-SNR weighting (arXiv 2303.09556); None weights all steps alike.
        motion_weight: extra weight of the places that change in a clip (`motion_weights`); 0 weighs all places alike.
        remapped_timesteps: what the network is told for every step, (t,); None: the step.
        timestep_logit_normal: mean and standard deviation of `logit(t / T)` from which diffusion steps are drawn (arXiv 2403.03206,
            section 3.1); None draws all steps alike.
        flow_weight: of PredictNet's flow loss; 0 leaves it out.
        text_dropout, image_dropout: probability of training without that condition, independently (arXiv 2207.12598).
        seed: of the run.
    """

    scheduler: SchedulerMixin
    prior: NoisePrior
    keyframe_position: str | int
    snr_gamma: float | None
    motion_weight: float
    timestep_logit_normal: Sequence[float] | None
    flow_weight: float
    text_dropout: float
    image_dropout: float
    seed: int
    remapped_timesteps: torch.Tensor | None = None

    def draw(self, numbers: Sequence[int], shape: torch.Size) -> TrainingNoise:
        """The random choices for the clips with these numbers in the global order, on the CPU.

        Each clip has its own generator, so its noise depends on neither batch size nor the number of processes. The small
        choices are drawn before the noise, and so depend on the latents' size neither.

        Args:
            shape: of one clip's latents, (f, c, h, w).
        """
        choices, t, noise = [], [], []
        for number in numbers:
            source = generator(self.seed, number)
            choices.append(torch.rand(2, generator=source))
            t.append(self._step(source))
            noise.append(torch.randn(shape, generator=source))
        keep = torch.stack(choices) >= torch.tensor([self.text_dropout, self.image_dropout])
        return TrainingNoise(torch.stack(noise), torch.stack(t), keep[:, 0], keep[:, 1])

    def _step(self, source: torch.Generator) -> torch.Tensor:
        steps = self.scheduler.config["num_train_timesteps"]
        if self.timestep_logit_normal is None:
            return torch.randint(steps, (), generator=source)
        mean, std = self.timestep_logit_normal
        # The smallest float32 below 1 times T may round up to T.
        return (steps * torch.sigmoid(mean + std * torch.randn((), generator=source))).long().clamp(max=steps - 1)


class TrainableModel(nn.Module):
    """All that trains as the one module that distributed wrappers want. It has no parameters of its own.

    Args:
        predict_net: reads the decoder's features, or None.
    """

    def __init__(
        self, unet: VideoUNet, condition_encoder: ConditionEncoder, predict_net: PredictNet | None = None
    ) -> None:
        super().__init__()
        self.unet = unet
        self.condition_encoder = condition_encoder
        self.predict_net = predict_net

    def forward(
        self,
        z_t: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        z_ref: torch.Tensor,
        fps: torch.Tensor,
        image_mask: torch.Tensor,
        **read: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prediction at `z_t` (b, f, c, h, w) and `t` (b,), and PredictNet's flow (b, f-1, 2, h, w), or None.

        Args:
            text: (b, n, d).
            z_ref: (b, c, h, w).
            fps, image_mask: (b,).
            read: what else the condition encoder reads, by its arguments' names.
        """
        features = self.unet.features(z_t, t, self.condition_encoder(text, z_ref, fps, image_mask, **read))
        prediction = rearrange(self.unet.head(features), "(b f) c h w -> b f c h w", b=len(z_t))
        return prediction, None if self.predict_net is None else self.predict_net(features, z_t.shape[1])


@dataclass(frozen=True)
class Losses:
    """Of every clip, (b,), float32.

    Attributes:
        total: what is minimised, in the mean.
        flow: PredictNet's part of it, before its weight, or None.
    """

    total: torch.Tensor
    flow: torch.Tensor | None = None


@dataclass(frozen=True)
class Dropped:
    """What stands for dropped captions: `text` (1, n, d) and `motion_tokens` (1, k, e) of the empty one."""

    text: torch.Tensor
    motion_tokens: torch.Tensor | None = None


def training_loss(
    denoiser: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    batch: Batch,
    draws: TrainingNoise,
    dropped: Dropped,
    objective: Objective,
) -> Losses:
    """The weighted squared error of every clip, and where PredictNet speaks its flow loss.

    Args:
        denoiser: called like `TrainableModel.forward`.
        draws: on the batch's device.
    """
    z_ref = batch.latents[:, keyframe_index(objective.keyframe_position, batch.latents.shape[1])]
    noise = objective.prior.noise(draws.noise, z_ref)
    z_t = add_noise(objective.scheduler, batch.latents, noise, draws.t)
    text_mask, read = draws.text_mask[:, None, None], dict(batch.image)
    text = torch.where(text_mask, batch.text, dropped.text)
    if batch.motion_tokens is not None and dropped.motion_tokens is not None:
        read["motion_tokens"] = torch.where(text_mask, batch.motion_tokens, dropped.motion_tokens)
    told = draws.t if objective.remapped_timesteps is None else objective.remapped_timesteps.to(z_t.device)[draws.t]
    prediction, flow = denoiser(z_t, told, text, z_ref, batch.fps, draws.image_mask, **read)
    wanted = target(objective.scheduler, batch.latents, noise, draws.t)
    error = squared_error(prediction, wanted, motion_weights(batch.latents, z_ref, objective.motion_weight))
    losses = error * loss_weights(objective.scheduler, draws.t, objective.snr_gamma)
    if flow is None or batch.flow is None:
        return Losses(losses)
    of_flow = flow_loss(flow, batch.flow.vectors, batch.flow.valid)
    return Losses(losses + objective.flow_weight * of_flow, of_flow)
