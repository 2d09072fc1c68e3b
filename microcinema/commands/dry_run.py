"""`train --dry-run`: a few steps of everything that a run does, in a folder that is removed, and from them what the run will take."""

import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from microcinema.commands import train
from microcinema.config.schema import Train
from microcinema.profiling.memory_estimate import Estimate, empty_pipeline, training_memory
from microcinema.training.distributed import make_accelerator
from microcinema.training.launch_settings import launch_settings
from microcinema.training.metrics import peak_memory
from microcinema.utils.files import make_folder

WARM_UP, MEASURED = 2, 5  # steps
GIB = 2**30
FOLDER = ".microcinema-dry-run"


@dataclass
class Measured:
    """Measurements of the main process: logged metrics of each step, seconds and bytes of one checkpoint and one validation (None: there
    was none), bytes of the saved pipeline, and peak memory in bytes (of tensors on a GPU, elsewhere the growth of the process)."""

    steps: list[Mapping[str, float]] = field(default_factory=list)
    checkpoint_seconds: float | None = None
    validation_seconds: float | None = None
    checkpoint_bytes: int = 0
    pipeline_bytes: int = 0
    memory: float = 0.0

    def median(self, figure: str) -> float:
        return statistics.median(step[figure] for step in self.steps[WARM_UP:])


@dataclass(frozen=True)
class Prediction:
    """Seconds of the whole run spent on steps, checkpoints and validations, and the peak of bytes in output_dir."""

    steps: float
    checkpoints: float
    validations: float
    disk: int

    @property
    def seconds(self) -> float:
        return self.steps + self.checkpoints + self.validations


def run(config: Train) -> int:
    """Trains a few steps, saves a checkpoint, makes a validation video in each process; prints what it took and what the run will take.

    Nothing stays in output_dir. Exit status and errors are those of `train`.
    """
    processes, main = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    found = Measured()
    with _scratch(Path(config.output_dir), main) as folder:
        steps = WARM_UP + MEASURED
        changes: dict[str, Any] = {"output_dir": str(folder), "report_to": None, "resume_from_checkpoint": None}
        changes |= {
            "max_train_steps": steps,
            "checkpointing_steps": steps,
            "validation_steps": steps,
            "logging_steps": 1,
        }
        changes["validation_prompts"] = list(config.validation_prompts)[:processes]

        def on_metrics(metrics: dict[str, float]) -> None:
            if "loss" in metrics:
                found.steps.append(metrics)
            elif "checkpoint_seconds" in metrics:
                found.checkpoint_seconds = metrics["checkpoint_seconds"]
                found.checkpoint_bytes = _size(folder / f"checkpoint-{steps}")
            else:
                found.validation_seconds = metrics["validation_seconds"]

        before = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
        if status := train.run(replace(config, **changes), on_metrics):
            return status  # asked to end
        found.memory = peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu")) - before
        if main:
            found.pipeline_bytes = _size(folder) - found.checkpoint_bytes
            for line in describe(config, processes, found, predict(config, processes, found), _estimate(config)):
                print(line, flush=True)
    return 0


def predict(config: Train, processes: int, found: Measured) -> Prediction:
    """What the run will take if it goes on as it was measured."""
    steps = config.max_train_steps
    clips = config.train_batch_size * config.gradient_accumulation_steps * processes
    saves, validations = (-(-steps // each) for each in (config.checkpointing_steps, config.validation_steps))
    # While the newest is written, the oldest is still there.
    kept = min(saves, (config.checkpoints_total_limit or saves) + 1)
    rounds = max(1, -(-len(config.validation_prompts) // processes))  # held-out clips alone are one
    return Prediction(
        steps=steps * clips / found.median("clips_per_second"),
        checkpoints=saves * (found.checkpoint_seconds or 0.0),
        validations=validations * rounds * (found.validation_seconds or 0.0),
        disk=kept * found.checkpoint_bytes + found.pipeline_bytes,
    )


def describe(config: Train, processes: int, found: Measured, run: Prediction, estimate: Estimate) -> Iterator[str]:
    """The lines that are printed."""
    clips = config.train_batch_size * config.gradient_accumulation_steps * processes
    rate = found.median("clips_per_second")
    wait, mfu = found.median("data_wait"), found.median("mfu")
    step = f"{clips / rate:.3g} s for {clips} clips ({rate:.3g} clips/s, median of {MEASURED})"
    yield f"step        {step}, {wait:.0%} of it waiting for data, {mfu:.0%} model FLOP utilization"
    if broken := int(max(step["broken_clips"] for step in found.steps)):
        yield f"data        {broken} clips could not be read; `microcinema prepare check` says which and why"
    estimated = f"{estimate.peak / GIB:.2f} GiB estimated (most of it when {estimate.worst})"
    yield f"memory      {found.memory / GIB:.2f} GiB measured, {estimated}"
    if found.checkpoint_seconds is not None:
        yield f"checkpoint  {found.checkpoint_seconds:.3g} s, {found.checkpoint_bytes / GIB:.2f} GiB"
    if found.validation_seconds is not None:
        yield f"validation  {found.validation_seconds:.3g} s with at most one prompt of each process"
    parts = {"training": run.steps, "checkpoints": run.checkpoints, "validation": run.validations}
    shares = ", ".join(f"{_duration(seconds)} of {name}" for name, seconds in parts.items())
    yield f"time        {_duration(run.seconds)} for {config.max_train_steps} steps: {shares}"
    free = shutil.disk_usage(config.output_dir).free
    short = "" if free > run.disk else "; set output_dir to a larger disk, or a lower checkpoints_total_limit"
    yield f"disk        {run.disk / GIB:.2f} GiB at most, {free / GIB:.2f} GiB free{short}"


@contextmanager
def _scratch(output_dir: Path, main: bool) -> Iterator[Path]:
    """A folder within output_dir, so on the disk of the run, that is removed in the end."""
    folder = output_dir / FOLDER
    if main:
        shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    failed = True
    try:
        yield folder
        failed = False
    finally:
        if main or failed:  # the launcher may end the main process when another one fails
            shutil.rmtree(folder, ignore_errors=True)


def _estimate(config: Train) -> Estimate:
    # With the precision that accelerate, which has one state per process, took.
    precision: Any = launch_settings(make_accelerator(config))["mixed_precision"]
    config, pipeline = replace(config, mixed_precision=precision), empty_pipeline(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return training_memory(pipeline, config, config.cached_latents is not None, device)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{seconds:.1f} s"
