"""The loss of a batch, and everything random about its clips. Pure functions of their arguments.

Shapes: latents `b f c h w`, one key frame `b c h w`, tokens `b n d`, time `b`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import SchedulerMixin
from torch import nn

from microcinema.config.schema import Train
from microcinema.data.keyframe_index import keyframe_index
from microcinema.data.keyframe_places import draw_places, main_keyframe, place_keyframes
from microcinema.data.motion_score import UNKNOWN
from microcinema.data.optical_flow import Flow
from microcinema.diffusion.losses import add_noise, flow_loss, loss_weights, motion_weights, squared_error, target
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.rng import generator
from microcinema.models.lora import add_lora
from microcinema.models.predict_net import PredictNet
from microcinema.models.unet2d import UNet2DBackbone
from microcinema.models.video_unet import VideoUNet, set_trainable
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.utils.device import to_device

LOSS_KEYS = (
    *("snr_gamma", "motion_weight", "timestep_logit_normal", "flow_weight", "text_dropout", "image_dropout"),
    *("motion_dropout", "keyframe_noise", "keyframe_places", "keyframe_place_sets"),
)
_MOTION_STREAM, _KEYFRAME_STREAM = 2, 3  # of a clip's generators; the first has what is drawn for every model
Denoiser = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""Called like `TrainableModel.forward`."""
Objective = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""Losses of every clip, (b,), and PredictNet's flow, called with the arguments of `training_loss` and the weights of `motion_weights`."""


@dataclass(frozen=True)
class Batch:
    """Encoded clips, all on one device."""

    latents: torch.Tensor  # scaled VAE latents z0, (b, f, c, h, w), float32
    text: torch.Tensor  # caption embeddings, (b, n, d)
    fps: torch.Tensor  # (b,)
    indices: Sequence[int]  # in the global order (data/ordering.py)
    image: Mapping[str, torch.Tensor] = field(default_factory=dict)  # `image_tokens` and `pixels` of the key frames
    motion_tokens: torch.Tensor | None = None  # (b, k, e)
    flow: Flow | None = None  # on the latent grid
    motion_score: torch.Tensor | None = None  # (b,), negative where unknown


@dataclass(frozen=True)
class NullConditioning:
    """Replaces dropped captions: `text` (1, n, d) and `motion_tokens` (1, k, e) of the empty caption."""

    text: torch.Tensor
    motion_tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class TrainingNoise:
    """Everything random about the clips of a batch."""

    noise: torch.Tensor  # independent standard noise eps, (b, f, c, h, w)
    t: torch.Tensor  # timesteps, (b,), integers
    text_mask: torch.Tensor  # False where the text is dropped, (b,)
    image_mask: torch.Tensor
    places: torch.Tensor | None = None  # True where a key frame is, (b, f); None: at the model's own place alone
    motion_mask: torch.Tensor | None = None  # False where the motion score is dropped, (b,); None: nowhere
    keyframe: torch.Tensor | None = None  # noise of the key frame, (b, c, h, w), None: none; and its level, (b,)
    keyframe_level: torch.Tensor | None = None

    def to(self, device: torch.device) -> "TrainingNoise":
        """The same noise on another device."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        return TrainingNoise(**{name: to_device(value, device) for name, value in values.items()})


@dataclass(frozen=True)
class Losses:
    """Losses of every clip, (b,), float32."""

    total: torch.Tensor
    flow: torch.Tensor | None = None  # PredictNet's, before its weight


@dataclass(frozen=True)
class LossConfig:
    """What a clip is trained on. The prediction type is the scheduler's.

    Attributes:
        keyframe_position: first, center or a frame index.
        snr_gamma: min-SNR weighting (arXiv 2303.09556); None weights all timesteps alike.
        motion_weight: extra weight where a clip departs from its key frame (`motion_weights`).
        timestep_logit_normal: mean and standard deviation of `logit(t / T)` (arXiv 2403.03206, section 3.1); None: uniform.
        text_dropout, image_dropout, motion_dropout: probability of training without that condition, independently (arXiv 2207.12598).
        keyframe_noise: largest level of noise on the key frame (`_keyframe_noise`); 0: the network is told none.
        keyframe_places: probability of other places than the model's own (`draw_places`); 0: the network does not see places.
        keyframe_place_sets: what these are.
        keeps_own_place: whether a key frame is at the model's own place in any case, since the network has its pixels from there.
        remapped_timesteps: the network's timestep for every timestep of the schedule, (t,); None for the same.
        objective: in place of the denoising loss, such as `consistency.Consistency`.
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
    keyframe_places: float = 0.0
    keyframe_place_sets: Sequence[str] = ()
    keeps_own_place: bool = False
    motion_dropout: float = 0.0
    keyframe_noise: float = 0.0
    remapped_timesteps: torch.Tensor | None = None
    objective: Objective | None = None

    def sample_noise_and_timesteps(self, indices: Sequence[int], shape: torch.Size) -> TrainingNoise:
        """Noise, timesteps and condition dropout of the clips with these global indices, on the CPU.

        Each clip has its own generator, so its noise depends on neither batch size nor number of processes. Timestep and
        dropout are drawn before the noise, so they do not depend on `shape`, (f, c, h, w); places after it, which they do not change.
        """
        uniform, t, noise, places = [], [], [], []
        own = keyframe_index(self.keyframe_position, shape[0])
        for index in indices:
            rng = generator(self.seed, index)
            uniform.append(torch.rand(2, generator=rng))
            t.append(self._sample_timestep(rng))
            noise.append(torch.randn(shape, generator=rng))
            if self.keyframe_places:
                places.append(draw_places(shape[0], own, self.keyframe_places, self.keyframe_place_sets, rng))
                places[-1][own] |= self.keeps_own_place
        mask = torch.stack(uniform) >= torch.tensor([self.text_dropout, self.image_dropout])
        kept, drawn = (mask[:, 0], mask[:, 1]), torch.stack(places) if places else None
        times = torch.stack(t)
        others = self._motion_mask(indices), *self._keyframe_noise(indices, times, shape[1:])
        return TrainingNoise(torch.stack(noise), times, *kept, drawn, *others)

    def _motion_mask(self, indices: Sequence[int]) -> torch.Tensor | None:
        if not self.motion_dropout:
            return None
        rngs = (generator(self.seed, index, _MOTION_STREAM) for index in indices)
        return torch.stack([torch.rand((), generator=rng) for rng in rngs]) >= self.motion_dropout

    def _keyframe_noise(self, indices: Sequence[int], t: torch.Tensor, shape: torch.Size) -> Iterator[torch.Tensor]:
        """Noise and level of the key frames, `beta_m sigmoid(n + 2 (t / T)^5 - 1)`, n standard normal (TimeNoise, arXiv 2406.15735)."""
        if self.keyframe_noise:
            rngs = [generator(self.seed, index, _KEYFRAME_STREAM) for index in indices]
            center = 2 * (t / self.scheduler.config["num_train_timesteps"]) ** 5 - 1
            level = (
                self.keyframe_noise
                * torch.stack([torch.randn((), generator=rng) for rng in rngs]).add(center).sigmoid()
            )
            yield torch.stack([torch.randn(shape, generator=rng) for rng in rngs])
            yield level

    def noise(self, batch: Batch, noise: TrainingNoise) -> torch.Tensor:
        """`eps_hat` of the clips, (b, f, c, h, w)."""
        return self.prior.noise(noise.noise, self.keyframes(batch.latents, noise.places))

    def keyframes(self, latents: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Key frames of clips (b, f, c, h, w), the main ones of `TrainingNoise.places`: (b, c, h, w)."""
        own = keyframe_index(self.keyframe_position, latents.shape[1])
        if places is None:
            return latents[:, own]
        return latents[torch.arange(len(latents), device=latents.device), main_keyframe(places, own)]

    def placed_keyframes(self, latents: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
        """Key frames of clips (b, f, c, h, w) at their places: (b, f, c+1, h, w)."""
        if places is None:
            places = torch.zeros(latents.shape[:2], dtype=torch.bool, device=latents.device)
            places[:, keyframe_index(self.keyframe_position, latents.shape[1])] = True
        return place_keyframes(latents, places)

    def _sample_timestep(self, rng: torch.Generator) -> torch.Tensor:
        steps = self.scheduler.config["num_train_timesteps"]
        if self.timestep_logit_normal is None:
            return torch.randint(steps, (), generator=rng)
        mean, std = self.timestep_logit_normal
        # The largest float32 below 1, times T, may round up to T.
        return (steps * torch.sigmoid(mean + std * torch.randn((), generator=rng))).long().clamp(max=steps - 1)


def make_loss_config(pipeline: ImageToVideoPipeline, config: Train, device: torch.device | None = None) -> LossConfig:
    """The loss of a run that trains this pipeline with this config, its tables on the device, so that no step copies them there."""
    scheduler, remapped = pipeline.training_scheduler, pipeline.remapped_timesteps
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    return LossConfig(
        scheduler=scheduler,
        prior=pipeline.noise_prior,
        remapped_timesteps=None if remapped is None else remapped.to(device),
        keyframe_position=pipeline.keyframe_position,
        keeps_own_place=pipeline.uses_image_conditioning,
        **{name: getattr(config, name) for name in ("seed", *LOSS_KEYS)}
        | {"motion_dropout": config.motion_dropout * pipeline.unet.options.motion_score},
    )


class TrainableModel(nn.Module):
    """Everything that trains, as the one module that distributed wrappers expect. It has no parameters of its own."""

    def __init__(self, unet: VideoUNet, predict_net: PredictNet | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.predict_net = predict_net

    @classmethod
    def for_training(
        cls, pipeline: ImageToVideoPipeline, config: Train, predict_net: PredictNet | None = None
    ) -> "TrainableModel":
        """The networks of a pipeline in training mode; only what the config names requires gradients."""
        if config.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        for module in pipeline.unet.modules():
            if isinstance(module, UNet2DBackbone):
                module.checkpoints_first_level_alone = config.gradient_checkpointing == "first_level"
        if config.lora is None:
            set_trainable(pipeline.unet, config.trainable_parameters, config.trainable_unet_layers)
        else:
            add_lora(pipeline.unet, **vars(config.lora))
        return cls(pipeline.unet, predict_net).train()

    def forward(
        self,
        z_t: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        z_ref: torch.Tensor,
        fps: torch.Tensor,
        image_mask: torch.Tensor,
        **inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prediction at `z_t` (b, f, c, h, w) and `t` (b,), and PredictNet's flow (b, f-1, 2, h, w), or None.

        Args:
            text, z_ref, fps, image_mask, inputs: of `VideoUNet.encode`: (b, n, d), (b, c, h, w), (b,), (b,), by name.
        """
        conditions = self.unet.encode(text, z_ref, fps, image_mask, **inputs)
        features = self.unet.features(z_t, t, conditions)
        prediction = self.unet.head(features, z_t, t, conditions)
        return prediction, None if self.predict_net is None else self.predict_net(features, z_t.shape[1])


def training_loss(
    denoiser: Denoiser, batch: Batch, noise: TrainingNoise, null: NullConditioning, config: LossConfig
) -> Losses:
    """The loss of every clip, as a rule the weighted squared error, plus PredictNet's flow loss; `noise` is on the batch's device."""
    weights = motion_weights(batch.latents, config.keyframes(batch.latents, noise.places), config.motion_weight)
    if config.objective is None:
        prediction, expected, flow = predict(denoiser, batch, noise, null, config)
        losses = squared_error(prediction, expected, weights)
        losses = losses * loss_weights(config.scheduler, noise.t, config.snr_gamma)
    else:
        losses, flow = config.objective(denoiser, batch, noise, null, config, weights)
    if flow is None or batch.flow is None:
        return Losses(losses)
    flow_losses = flow_loss(flow, batch.flow.vectors, batch.flow.valid)
    return Losses(losses + config.flow_weight * flow_losses, flow_losses)


def predict(
    denoiser: Denoiser, batch: Batch, noise: TrainingNoise, null: NullConditioning, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The prediction for noisy clips, its target, both (b, f, c, h, w), and PredictNet's flow, or None."""
    eps = config.noise(batch, noise)
    z_t = add_noise(config.scheduler, batch.latents, eps, noise.t)
    prediction, flow = evaluate(denoiser, z_t, noise.t, batch, noise, null, config)
    return prediction, target(config.scheduler, batch.latents, eps, noise.t), flow


def evaluate(
    denoiser: Denoiser,
    z_t: torch.Tensor,
    t: torch.Tensor,
    batch: Batch,
    noise: TrainingNoise,
    null: NullConditioning,
    config: LossConfig,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The prediction at `z_t` (b, f, c, h, w) and `t` (b,) under the conditions that the masks of `noise` keep, and the flow, or None."""
    text_mask, inputs = noise.text_mask[:, None, None], dict(batch.image)
    text = torch.where(text_mask, batch.text, null.text)
    if batch.motion_tokens is not None and null.motion_tokens is not None:
        inputs["motion_tokens"] = torch.where(text_mask, batch.motion_tokens, null.motion_tokens)
    if (score := batch.motion_score) is not None:
        dropped = torch.full_like(score, UNKNOWN)
        inputs["motion_score"] = score if noise.motion_mask is None else torch.where(noise.motion_mask, score, dropped)
    t_model = t if config.remapped_timesteps is None else config.remapped_timesteps.to(z_t.device)[t]
    if config.keyframe_places:
        inputs["placed"] = config.placed_keyframes(batch.latents, noise.places)
    z_ref = config.keyframes(batch.latents, noise.places)
    if config.keyframe_noise:
        level = torch.zeros_like(batch.fps) if noise.keyframe_level is None else noise.keyframe_level
        z_ref = z_ref if noise.keyframe is None else z_ref + level[:, None, None, None] * noise.keyframe
        inputs["keyframe_noise"] = 100 * level
    return denoiser(z_t, t_model, text, z_ref, batch.fps, noise.image_mask, **inputs)
