"""The settings of a training run, by the names that diffusers' training scripts use."""

from collections.abc import Sequence
from dataclasses import dataclass

from microcinema.utils.errors import UserError

TRACKERS = ("tensorboard", "wandb")
PRECISIONS = ("no", "fp16", "bf16")


@dataclass(frozen=True)
class Settings:
    """How to train; meanings and defaults are those of `configs/train.yaml`.

    Raises:
        UserError: a value that cannot work, with its name.
    """

    output_dir: str
    max_train_steps: int
    seed: int = 0
    trainable_parameters: str = "temporal"
    trainable_unet_layers: Sequence[str] = ()
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 500
    use_8bit_adam: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    snr_gamma: float | None = None
    motion_weight: float = 0.0
    timestep_logit_normal: Sequence[float] | None = None
    flow_weight: float = 0.1
    text_dropout: float = 0.1
    image_dropout: float = 0.1
    use_ema: bool = True
    ema_decay: float = 0.9999
    mixed_precision: str | None = None
    gradient_checkpointing: bool = False
    dataloader_num_workers: int = 2
    clip_retries: int = 1
    max_error_rate: float = 0.05
    validation_prompts: Sequence[str] = ()
    validation_steps: int = 1000
    report_to: str | None = "tensorboard"
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int | None = 3
    resume_from_checkpoint: str | None = None

    def __post_init__(self) -> None:
        at_least = {
            1: (
                "max_train_steps",
                "train_batch_size",
                "gradient_accumulation_steps",
                "validation_steps",
                "checkpointing_steps",
            ),
            0: ("seed", "lr_warmup_steps", "dataloader_num_workers", "clip_retries"),
        }
        for low, names in at_least.items():
            for name in names:
                if getattr(self, name) < low:
                    raise UserError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        for name in ("text_dropout", "image_dropout", "ema_decay", "max_error_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        for name in ("motion_weight", "flow_weight"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        if self.timestep_logit_normal is not None and not (
            len(self.timestep_logit_normal) == 2 and self.timestep_logit_normal[1] > 0
        ):
            raise UserError(
                f"timestep_logit_normal is {list(self.timestep_logit_normal)}; give [mean, standard deviation > 0], or null"
            )
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise UserError(
                f"checkpoints_total_limit is {self.checkpoints_total_limit}; use 1 or more, or null to keep all"
            )
        for name, known in (("report_to", TRACKERS), ("mixed_precision", PRECISIONS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"{name} is '{value}'; use one of {', '.join(known)}, or null")
