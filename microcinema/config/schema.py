"""The keys of each command, their types and bounds: `Train` for `configs/train.yaml`, which has defaults and meanings.

These objects are frozen and travel as they are; `dataclasses.replace` makes a changed one, and checks it.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from microcinema.config.instantiate import Component, components
from microcinema.config.network import NetworkOptions
from microcinema.config.sampling import KeyframeSettings, MemorySettings, SamplingSettings
from microcinema.config.types import CONFIG, Count, CountOrZero, Dtype, Fraction, NotNegative, Positive

Resolution = Count | tuple[Count, Count]
"""Pixels: one number for squares, or (height, width)."""
LRScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Reject = Literal["short", "static", "cut", "duplicate", "watermark"]
Open = Annotated[Component, BeforeValidator(components)]
"""An open group: its keys are the arguments of its target."""


def _check_path(path: str) -> str:
    if not path.strip():
        raise ValueError("should name a file or folder")
    return path


PathText = Annotated[str, AfterValidator(_check_path)]


@dataclass(frozen=True, config=CONFIG)
class Base:
    pretrained_model_name_or_path: str
    revision: str | None
    variant: str | None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None


@dataclass(frozen=True, config=CONFIG)
class Schedule:
    prediction_type: str | None
    beta_schedule: str | None
    rescale_betas_zero_snr: bool | None
    timestep_spacing: str | None
    snr_shift: Positive | None


@dataclass(frozen=True, config=CONFIG)
class Diffusion:
    noise_prior: Open
    scheduler: Schedule


@dataclass(frozen=True, config=CONFIG)
class Model(NetworkOptions):
    keyframe_position: Literal["first", "center"] | CountOrZero
    image_encoder: str | None
    motion_encoder: str | None
    num_motion_tokens: Count
    flow_model: str | None


@dataclass(frozen=True, config=CONFIG)
class SamplingDefaults:
    num_inference_steps: Count
    guidance_scale: NotNegative
    image_guidance_scale: NotNegative
    keyframe_num_inference_steps: Count | None
    keyframe_guidance_scale: NotNegative | None


@dataclass(frozen=True, config=CONFIG)
class Clips:
    data: Open
    resolution: Resolution
    num_frames: Count
    fps: Positive | None
    seed: CountOrZero


@dataclass(frozen=True, config=CONFIG)
class Train(Clips):
    base: Base
    cached_latents: PathText | None
    diffusion: Diffusion
    model: Model
    output_dir: PathText
    init_weights_from: str | None
    trainable_parameters: Literal["temporal", "all"]
    trainable_unet_layers: list[str]
    train_batch_size: Count
    gradient_accumulation_steps: Count
    max_train_steps: Count
    learning_rate: Positive
    lr_scheduler: LRScheduler
    lr_warmup_steps: CountOrZero
    use_8bit_adam: bool
    adam_beta1: Fraction
    adam_beta2: Fraction
    adam_weight_decay: NotNegative
    adam_epsilon: Positive
    max_grad_norm: Positive
    snr_gamma: Positive | None
    motion_weight: NotNegative
    timestep_logit_normal: tuple[float, Positive] | None
    flow_weight: NotNegative
    text_dropout: Fraction
    image_dropout: Fraction
    use_ema: bool
    ema_decay: Fraction
    mixed_precision: Literal["no", "fp16", "bf16"] | None
    gradient_checkpointing: bool
    dataloader_num_workers: CountOrZero
    clip_retries: CountOrZero
    max_error_rate: Fraction
    sampling: SamplingDefaults
    validation_prompts: list[str]
    validation_data: Annotated[dict[str, Any], BeforeValidator(components)] | None
    validation_clips: Count
    validation_steps: Count
    report_to: Literal["tensorboard", "wandb"] | None
    checkpointing_steps: Count
    checkpoints_total_limit: Count | None
    resume_from_checkpoint: str | None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Sample(SamplingSettings):
    prompt: str | None
    motion_prompt: str | None
    image: str | None
    prompts: str | None
    seed: CountOrZero
    output_dir: PathText
    pipeline: str
    keyframe: KeyframeSettings
    memory: MemorySettings
    height: Count | None
    width: Count | None
    window_overlap: CountOrZero | None
    negative_prompt: str
    num_videos_per_prompt: Count
    scheduler: str | None
    video_crf: Annotated[int, Field(ge=0, le=51)]


@dataclass(frozen=True, config=CONFIG)
class Generation:
    protocol: Open
    keyframe_model: str | None
    torch_dtype: Dtype
    num_inference_steps: Count | None
    guidance_scale: NotNegative | None
    image_guidance_scale: NotNegative | None
    gamma: NotNegative | None
    keyframe_num_inference_steps: Count | None
    keyframe_guidance_scale: NotNegative | None


@dataclass(frozen=True, config=CONFIG)
class SpritesEvaluation(Generation):
    classifier: str


@dataclass(frozen=True, config=CONFIG)
class Weights:
    weights: str | None
    sha256: str | None = None


@dataclass(frozen=True, config=CONFIG)
class ZeroShotEvaluation(Generation):
    root: str
    allow_fewer: bool
    real_features_dir: PathText | None
    video: Open
    c3d: Weights
    clip: Weights
    inception: Weights
    height: Count | None
    width: Count | None


def _evaluation_kind(node: Any) -> str:
    sprites = isinstance(node, SpritesEvaluation) or (isinstance(node, dict) and "classifier" in node)
    return "sprites" if sprites else "zero_shot"


Evaluation = Annotated[
    Annotated[SpritesEvaluation, Tag("sprites")] | Annotated[ZeroShotEvaluation, Tag("zero_shot")],
    Discriminator(_evaluation_kind),
]


@dataclass(frozen=True, config=CONFIG)
class Evaluate:
    evaluation: Evaluation
    pipeline: str
    generated_dir: str | None
    output_dir: PathText
    seed: CountOrZero
    batch_size: Count


@dataclass(frozen=True, config=CONFIG)
class PrepareSprites:
    output_dir: PathText
    num_videos: Count
    split: Literal["train", "heldout"]
    rotation_weight: Count
    seed: CountOrZero
    num_frames: Count
    size: Count
    fps: Positive


@dataclass(frozen=True, config=CONFIG)
class PrepareLatents(Train):
    cached_parts: list[Literal["text", "motion_tokens", "image_tokens", "keyframe", "flow"]] | None
    epochs_cached: Count
    clips_per_shard: Count


@dataclass(frozen=True, config=CONFIG)
class PrepareCheck(Clips):
    output_dir: PathText
    max_samples: Count | None
    num_workers: Count | None
    ray_address: str | None
    timeout: Positive
    reject: list[Reject]
    min_motion: NotNegative
    max_watermark_score: float


@dataclass(frozen=True, config=CONFIG)
class PreparePreview(Clips):
    output: PathText
    max_samples: Count
    columns: Count | None


@dataclass(frozen=True, config=CONFIG)
class Export:
    checkpoint: str | None
    output_dir: PathText
    use_ema: bool
    with_base: bool
    torch_dtype: Dtype
