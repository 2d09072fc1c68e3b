"""The keys of each command, their types and bounds: `Train` for `configs/train.yaml`, which has defaults and meanings.

These objects are frozen and travel as they are; `dataclasses.replace` makes a changed one, and checks it.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from microcinema.config import types
from microcinema.config.instantiate import Component, components
from microcinema.config.network import NetworkOptions
from microcinema.config.sampling import (
    DenoisingSettings,
    KeyframeSettings,
    MemorySettings,
    SamplingSettings,
    UpscaleSettings,
)
from microcinema.config.types import CONFIG

LRScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
FlowModel = Literal["dis", "raft", "microcinema.sprites.flow.GroundTruthFlow"]
Reject = Literal["short", "static", "cut", "duplicate", "watermark"]
Open = Annotated[Component, BeforeValidator(components)]
"""An open group: its keys are the arguments of its target."""


@dataclass(frozen=True, config=CONFIG)
class Base:
    pretrained_model_name_or_path: types.PathText
    revision: types.Name | None
    variant: types.Name | None
    prediction_type: types.PredictionType | None


@dataclass(frozen=True, config=CONFIG)
class Schedule:
    prediction_type: types.PredictionType | None
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None
    rescale_betas_zero_snr: bool | None
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None
    snr_shift: types.Positive | None


@dataclass(frozen=True, config=CONFIG)
class Diffusion:
    noise_prior: Open
    scheduler: Schedule


@dataclass(frozen=True, config=CONFIG)
class Model(NetworkOptions):
    keyframe_position: Literal["first", "center"] | types.CountOrZero
    image_encoder: types.PathText | None
    motion_encoder: types.PathText | None
    num_motion_tokens: types.Size
    flow_model: FlowModel | None


@dataclass(frozen=True, config=CONFIG)
class SamplingDefaults:
    num_inference_steps: types.Count
    guidance_scale: types.NotNegative
    image_guidance_scale: types.NotNegative
    keyframe_num_inference_steps: types.Count | None
    keyframe_guidance_scale: types.NotNegative | None


@dataclass(frozen=True, config=CONFIG)
class Clips:
    data: Open
    resolution: types.Resolution
    num_frames: types.Size
    fps: types.Fps | None
    seed: Annotated[types.Seed, Field(lt=2**32)]  # as the global generator of numpy


@dataclass(frozen=True, config=CONFIG)
class DataParallel:
    comm_hook: Literal["fp16", "bf16"] | None
    bucket_cap_mb: types.Count


@dataclass(frozen=True, config=CONFIG)
class Consistency:
    teacher: types.PathText
    num_ode_steps: Annotated[types.Count, Field(ge=20, le=1000)]  # from 20 on its sampler can be tried
    phases: types.Count
    guidance_scale: types.NotNegative | None
    image_guidance_scale: types.NotNegative | None
    huber_c: types.Positive


@dataclass(frozen=True, config=CONFIG)
class Tracker:
    project: types.Name
    name: types.Name | None
    group: types.Name | None
    tags: list[types.StrictText]


@dataclass(frozen=True, config=CONFIG)
class LoRA:
    rank: types.Size
    alpha: types.Positive
    targets: Literal["spatial", "temporal", "both"]
    dropout: types.Decay


@dataclass(frozen=True, config=CONFIG)
class Train(Clips):
    base: Base
    cached_latents: types.PathText | None
    diffusion: Diffusion
    model: Model
    output_dir: types.PathText
    init_weights_from: types.PathText | None
    objective: Consistency | None
    lora: LoRA | None
    trainable_parameters: Literal["temporal", "all"]
    trainable_unet_layers: list[types.StrictText]
    train_batch_size: types.Count
    gradient_accumulation_steps: types.Count
    max_train_steps: types.Count
    learning_rate: types.Positive
    lr_scheduler: LRScheduler
    lr_warmup_steps: types.CountOrZero
    use_8bit_adam: bool
    adam_beta1: types.Decay
    adam_beta2: types.Decay
    adam_weight_decay: types.NotNegative
    adam_epsilon: types.Positive
    max_grad_norm: types.Positive
    snr_gamma: types.Positive | None
    motion_weight: types.NotNegative
    timestep_logit_normal: tuple[types.Number, types.Positive] | None
    flow_weight: types.NotNegative
    text_dropout: types.Fraction
    image_dropout: types.Fraction
    keyframe_places: types.Fraction
    keyframe_place_sets: Annotated[list[types.PlaceSet], Field(min_length=1)]
    motion_dropout: types.Fraction
    keyframe_noise: types.NotNegative
    use_ema: bool
    ema_decay: types.Decay
    mixed_precision: Literal["no", "fp16", "bf16"] | None
    allow_tf32: bool
    compile: bool
    ddp: DataParallel
    quantization: Literal["int8"] | None
    gradient_checkpointing: bool | Literal["first_level"]
    dataloader_num_workers: types.CountOrZero
    clip_retries: types.CountOrZero
    max_error_rate: types.Fraction
    sampling: SamplingDefaults
    validation_prompts: list[types.Prompt]
    validation_data: Annotated[dict[str, Any], BeforeValidator(components)] | None
    validation_clips: types.Count
    validation_steps: types.Count
    logging_steps: types.Count
    report_to: Literal["tensorboard", "wandb"] | None
    tracker: Tracker
    checkpointing_steps: types.Count
    checkpoints_total_limit: types.Count | None
    resume_from_checkpoint: types.PathText | None

    def __post_init__(self) -> None:
        position = self.model.keyframe_position
        if self.trainable_parameters == "all" and self.trainable_unet_layers:
            layers = f"every layer trains, not {self.trainable_unet_layers} alone; set trainable_unet_layers=[]"
            raise ValueError(f"with trainable_parameters=all {layers}, or trainable_parameters=temporal")
        if self.quantization is not None and self.trainable_parameters == "all":
            raise ValueError(
                "quantization=int8 is for frozen weights, and all train; set trainable_parameters=temporal, or quantization=null"
            )
        if self.objective is not None and self.snr_gamma is not None:
            raise ValueError(
                f"snr_gamma={self.snr_gamma} weights the denoising loss, not the objective; set snr_gamma=null"
            )
        if (self.keyframe_places > 0) != self.model.keyframe_places:
            fault = f"keyframe_places={self.keyframe_places} and model.keyframe_places={self.model.keyframe_places}"
            raise ValueError(f"{fault}; use true with a share of clips such as 0.5, or false with 0")
        if (self.keyframe_noise > 0) != self.model.keyframe_noise:
            fault = f"keyframe_noise={self.keyframe_noise} and model.keyframe_noise={self.model.keyframe_noise}"
            raise ValueError(f"{fault}; use true with a level such as 2, or false with 0")
        trains_more = self.model.flow_model or self.trainable_unet_layers or self.trainable_parameters == "all"
        if self.lora is not None and (trains_more or self.init_weights_from is None):
            raise ValueError(
                "a LoRA trains alone, for the model that init_weights_from names; see configs/lora/motion.yaml"
            )
        if self.num_frames > self.model.max_frames:
            raise ValueError(
                f"num_frames={self.num_frames} is more than model.max_frames={self.model.max_frames}; set it"
            )
        if isinstance(position, int) and position >= self.num_frames:
            raise ValueError(
                f"model.keyframe_position={position} is not in a clip of num_frames={self.num_frames}; lower it"
            )


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Sample(SamplingSettings):
    prompt: str | None
    motion_prompt: str | None
    image: types.PathText | None
    mask: types.PathText | None
    keyframes: list[int | types.StrictPath] | None
    prompts: types.PathText | None
    seed: types.Seed
    output_dir: types.PathText
    pipeline: types.PathText
    lora: list[types.StrictPath]
    keyframe: KeyframeSettings
    keyframes_only: bool
    memory: MemorySettings
    upscale: UpscaleSettings
    negative_prompt: str
    num_videos_per_prompt: types.Count
    video_crf: Annotated[types.CountOrZero, Field(le=51)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Generation(DenoisingSettings):
    protocol: Open
    keyframe_model: types.PathText | None
    torch_dtype: types.Dtype
    keyframe_num_inference_steps: types.Count | None
    keyframe_guidance_scale: types.NotNegative | None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SpritesEvaluation(Generation):
    classifier: types.PathText


@dataclass(frozen=True, config=CONFIG)
class Weights:
    weights: types.PathText | None
    sha256: types.Sha256 | None = None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ZeroShotEvaluation(Generation):
    root: types.PathText
    allow_fewer: bool
    skip_real: types.PathText | None
    real_features_dir: types.PathText | None
    video: Open
    probe: Weights
    c3d: Weights
    clip: Weights
    inception: Weights
    height: types.Size | None
    width: types.Size | None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class VBenchEvaluation(Generation):
    results: types.PathText | None
    dino: Weights
    clip: Weights
    aesthetic: Weights
    aesthetic_clip: Weights
    musiq: Weights
    raft: Weights
    height: types.Size | None
    width: types.Size | None
    num_frames: types.Size
    fps: types.Fps | None


def _evaluation_kind(node: Any) -> str:
    keys = node if isinstance(node, dict) else getattr(node, "__dict__", ())
    return "sprites" if "classifier" in keys else "vbench" if "results" in keys else "zero_shot"


Evaluation = Annotated[
    Annotated[SpritesEvaluation, Tag("sprites")]
    | Annotated[ZeroShotEvaluation, Tag("zero_shot")]
    | Annotated[VBenchEvaluation, Tag("vbench")],
    Discriminator(_evaluation_kind),
]


@dataclass(frozen=True, config=CONFIG)
class Evaluate:
    evaluation: Evaluation
    pipeline: types.PathText
    lora: list[types.StrictPath]
    generated_dir: types.PathText | None
    compare: list[types.StrictPath] | None
    output_dir: types.PathText
    seed: types.Seed
    batch_size: types.Count


@dataclass(frozen=True, config=CONFIG)
class Sweep:
    train: list[types.StrictText] | None
    evaluate: list[types.StrictText] | None
    variants: dict[types.Name, list[types.StrictText]] | None
    grid: dict[types.Name, Annotated[list[Any], Field(min_length=1)]] | None
    seeds: Annotated[list[types.Seed], Field(min_length=1)]
    measures: list[types.StrictText] | None
    workers: types.Count
    launch: Annotated[list[types.StrictText], Field(min_length=1)] | None
    output_dir: types.PathText


@dataclass(frozen=True, config=CONFIG)
class PrepareSprites:
    output_dir: types.PathText
    num_videos: types.Count
    split: Literal["train", "heldout"]
    rotation_weight: types.Count
    seed: types.Seed
    num_frames: types.Size
    size: types.Size
    fps: types.Fps


@dataclass(frozen=True, config=CONFIG)
class PrepareLatents(Train):
    cached_parts: list[Literal["text", "motion_tokens", "image_tokens", "keyframe", "flow"]] | None
    epochs_cached: types.Count
    clips_per_shard: types.Count


@dataclass(frozen=True, config=CONFIG)
class PrepareCheck(Clips):
    output_dir: types.PathText
    max_samples: types.Count | None
    num_workers: types.Size | None
    ray_address: types.Name | None
    timeout: types.Positive
    reject: list[Reject]
    min_motion: types.NotNegative
    max_watermark_score: types.Number


@dataclass(frozen=True, config=CONFIG)
class PreparePreview(Clips):
    output: types.PathText
    max_samples: types.Count
    columns: types.Count | None


@dataclass(frozen=True, config=CONFIG)
class Export:
    checkpoint: types.PathText | None
    output_dir: types.PathText
    use_ema: bool
    with_base: bool
    torch_dtype: types.Dtype


@dataclass(frozen=True, config=CONFIG)
class Watch:
    folder: types.PathText
    serve: bool
    port: Annotated[types.CountOrZero, Field(le=65535)]
    refresh: types.Count


@dataclass(frozen=True, config=CONFIG)
class Ui:
    output_dir: types.PathText
    pipelines: Annotated[list[types.StrictPath], Field(min_length=1)]
    lora: list[types.StrictPath]
    host: types.Name
    port: Annotated[types.Count, Field(le=65535)]
    share: bool
