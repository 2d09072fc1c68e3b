"""Which checkpoint a run resumes from, and what the run and the checkpoint must have in common."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microcinema.config.schema import Train
from microcinema.data.indexed import IndexedDataset
from microcinema.diffusion.schedule import schedule_summary
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.loading import resolve_snapshot
from microcinema.training.loss import LOSS_KEYS
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.fingerprint import differences
from microcinema.utils.hashing import SUMS, checksum_error, hash_file, hash_json

STATE = "training_state.json"

Identity = dict[str, dict[str, Any]]
"""`fixed`: settings that must agree; `free`: settings that may differ, which makes it another run than an uninterrupted one."""

# A checkpoint restores the optimizer's own settings: another value would silently change nothing.
FIXED = ("seed", "learning_rate", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
BATCH = ("train_batch_size", "gradient_accumulation_steps", "lr_scheduler", "lr_warmup_steps", "max_grad_norm")
FREE = (*BATCH, *LOSS_KEYS, "use_ema", "ema_decay", "quantization")
PIPELINE = (
    *("num_frames", "height", "width", "fps", "noise_prior", "noise_prior_strength", "keyframe_position"),
    "network_schedule",
)


@dataclass(frozen=True)
class Progress:
    """Progress of a run."""

    step: int  # optimizer steps done
    clips: int  # global index of the next clip


def find_checkpoints(output_dir: str | os.PathLike[str], up_to: float = float("inf")) -> list[Path]:
    """The checkpoints of a run, oldest first, up to a step."""
    steps = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and int(match[1]) <= up_to and is_checkpoint(folder):
            steps[int(match[1])] = folder
    return [steps[step] for step in sorted(steps)]


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder is a checkpoint, intact or not."""
    return any((Path(folder) / name).is_file() for name in (STATE, SUMS))


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The `training_state.json` of a checkpoint: `progress`, `trained`, `run` and `ema_step`; a UserError if unreadable."""
    with user_errors(f"checkpoint '{folder}' cannot be read ({{reason}}); use another one"):
        state = json.loads((Path(folder) / STATE).read_text())
        Progress(**{key: int(value) for key, value in state["progress"].items()})
        return {**state, "trained": [*map(str, state["trained"])], "run": state["run"] and {**state["run"]}}


def read_progress(folder: str | os.PathLike[str]) -> Progress:
    """The run's progress when it wrote a checkpoint."""
    return Progress(**read_state(folder)["progress"])


def choose_checkpoint(
    output_dir: str | os.PathLike[str],
    resume_from_checkpoint: str | None,
    warn: Callable[[str], None] = print,
) -> Path | None:
    """The checkpoint to resume from, verified against its checksums, or None for a new run.

    With `latest`, an empty folder starts a new run, so that one command line serves a job that is requeued again and again;
    damaged checkpoints are skipped, with a warning each. A UserError if the named checkpoint or all are damaged or missing, or a new run
    would mix with an earlier one.
    """
    checkpoints = find_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if checkpoints:
            advice = "set resume_from_checkpoint=latest or another output_dir"
            raise UserError(f"'{output_dir}' already holds {checkpoints[-1].name}; {advice}")
        return None
    if resume_from_checkpoint == "latest":
        for folder in reversed(checkpoints):
            if (fault := checksum_error(folder)) is None:
                return folder
            warn(f"{folder.name} is damaged ({fault}); trying the one before")
        if checkpoints:
            raise UserError(f"all {len(checkpoints)} checkpoints in '{output_dir}' are damaged; use another output_dir")
        return None
    path = Path(resume_from_checkpoint)
    if not is_checkpoint(path):
        names = ", ".join(folder.name for folder in checkpoints) or "none"
        raise UserError(f"'{path}' is not a checkpoint (no {STATE} in it); '{output_dir}' holds: {names}")
    if (fault := checksum_error(path)) is not None:
        raise UserError(f"checkpoint '{path}' is damaged ({fault}); set resume_from_checkpoint=latest, or name another")
    return path


def run_identity(
    config: Train,
    pipeline: ImageToVideoPipeline,
    clips: IndexedDataset,
    num_processes: int,
    mixed_precision: str,
) -> Identity:
    """The identity of a run, as read back from JSON; `mixed_precision` as resolved by accelerate."""
    fixed = {name: getattr(config, name) for name in FIXED}
    fixed |= {name: pipeline.config[name] for name in PIPELINE}
    fixed |= schedule_summary(pipeline.training_scheduler)
    fixed["motion_quantiles"] = pipeline.config["motion_quantiles"]  # which an exported checkpoint gets from here
    fixed["clips"] = clips.fingerprint()
    if config.objective is not None:
        files = Path(resolve_snapshot(config.objective.teacher, ["unet"]), "unet").glob("*.safetensors")
        fixed["objective"] = {
            **vars(config.objective),
            "teacher": hash_json({file.name: hash_file(file) for file in files}),
        }
    if config.lora is not None:
        fixed["lora"] = vars(config.lora)
    free = {name: getattr(config, name) for name in FREE}
    free |= {"ddp.comm_hook": config.ddp.comm_hook}
    free |= {"mixed_precision": mixed_precision, "num_processes": num_processes}
    if not config.lr_scheduler.startswith("constant"):  # other schedules depend on the length of the run
        free["max_train_steps"] = config.max_train_steps
    return json.loads(json.dumps({"fixed": fixed, "free": free}, default=list))


def check_identity(folder: Path, saved: Identity, current: Identity) -> list[str]:
    """The free settings that differ between a checkpoint and the run; a UserError if a fixed one does."""
    new = current["fixed"]
    old = {"network_schedule": new["network_schedule"], **saved["fixed"]}  # older checkpoints do not have it
    if old["seed"] != new["seed"]:  # the seed decides the order of the clips
        new = {**new, "clips": old["clips"]}
    if changed := differences(new, old):
        more = f", and {len(changed) - 4} more" if len(changed) > 4 else ""
        hint = "resume with the same values, or start a new run from its weights with init_weights_from"
        raise UserError(f"checkpoint '{folder}' is of another run: {'; '.join(changed[:4])}{more}; {hint}")
    # Of a setting that an older checkpoint does not have, it is as a run of today without it.
    return differences(current["free"], {**current["free"], **saved["free"]})
