"""The top-level keys of each command, their types and bounds. Defaults and meanings are in `configs/<command>.yaml`."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Group = dict[str, Any]
"""A node that a config group fills; its keys are the ones that the chosen file holds."""


@dataclass
class SamplingDefaults:
    num_inference_steps: Count
    guidance_scale: NotNegative
    image_guidance_scale: NotNegative
    keyframe_num_inference_steps: Count | None
    keyframe_guidance_scale: NotNegative | None


@dataclass
class Train:
    base: Group
    data: Group
    cached_latents: str | None
    diffusion: Group
    model: Group
    output_dir: str
    seed: int
    init_weights_from: str | None
    trainable_parameters: Literal["temporal", "all"]
    trainable_unet_layers: list[str]
    resolution: Count | tuple[Count, Count]
    num_frames: Count
    fps: Positive | None
    train_batch_size: Count
    gradient_accumulation_steps: Count
    max_train_steps: Count
    learning_rate: Positive
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
    ]
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
    validation_steps: Count
    report_to: Literal["tensorboard", "wandb"] | None
    checkpointing_steps: Count
    checkpoints_total_limit: Count | None
    resume_from_checkpoint: str | None


@dataclass
class Sample:
    prompt: str | None
    motion_prompt: str | None
    image: str | None
    prompts: str | None
    seed: CountOrZero
    output_dir: str
    pipeline: str
    keyframe: Group
    memory: Group
    num_frames: Count | None
    num_segments: Count
    window_overlap: CountOrZero | None
    fps: Positive | None
    height: Count | None
    width: Count | None
    num_inference_steps: Count | None
    guidance_scale: NotNegative | None
    image_guidance_scale: NotNegative | None
    negative_prompt: str
    num_videos_per_prompt: Count
    decode_chunk_size: Count | None
    scheduler: str | None
    video_crf: Annotated[int, Field(ge=0, le=51)]


@dataclass
class Evaluate:
    evaluation: Group
    pipeline: str
    generated_dir: str | None
    output_dir: str
    seed: CountOrZero
    batch_size: Count


@dataclass
class Prepare:
    output_dir: str
    num_videos: Count
    split: Literal["train", "heldout"]
    rotation_weight: Count
    seed: CountOrZero
    num_frames: Count
    size: Count
    fps: Positive


@dataclass
class Latents(Train):
    cached_parts: list[Literal["text", "motion_tokens", "image_tokens", "keyframe", "flow"]] | None
    epochs_cached: Count
    clips_per_shard: Count


@dataclass
class Check:
    data: Group
    output_dir: str
    max_samples: Count | None
    num_workers: Count | None
    ray_address: str | None
    timeout: Positive
    reject: list[Literal["short", "static", "cut", "duplicate", "watermark"]]
    min_motion: NotNegative
    max_watermark_score: float
    resolution: Count | tuple[Count, Count]
    num_frames: Count
    fps: Positive | None
    seed: CountOrZero


@dataclass
class Preview:
    data: Group
    output: str
    max_samples: Count
    columns: Count | None
    resolution: Count | tuple[Count, Count]
    num_frames: Count
    fps: Positive | None
    seed: CountOrZero


@dataclass
class Export:
    checkpoint: str | None
    output_dir: str
    use_ema: bool
    with_base: bool
    torch_dtype: Literal["float32", "float16", "bfloat16"]


COMMANDS = {
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
    "prepare": Prepare,
    "prepare check": Check,
    "prepare preview": Preview,
    "prepare latents": Latents,
    "export": Export,
    "doctor": Train,
}
