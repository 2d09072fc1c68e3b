"""Checkpoints that resume: `output_dir/checkpoint-{step}/`, whole or absent, written by every process that holds a part.

checkpoint-1000/
  unet/  condition_encoder/     diffusers folders, as in a pipeline
  ema.safetensors               moving averages of the trained parameters, by name
  optimizer.bin  scheduler.bin  random_states_{rank}.pkl  and what else accelerate saves (scaler, shards)
  training_state.json           step, number of the next clip, names of the trained parameters
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from microcinema.errors import UserError
from microcinema.files import atomic_folder

_STATE = "training_state.json"
_EMA = "ema.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        clips: number of the next clip in the global order.
    """

    step: int
    clips: int


def find_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    steps = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and is_checkpoint(folder):
            steps[int(match[1])] = folder
    return [steps[step] for step in sorted(steps)]


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is there."""
    return (Path(folder) / _STATE).is_file()


def read_progress(folder: str | os.PathLike[str]) -> Progress:
    """How far the run had come when it wrote a checkpoint.

    Raises:
        UserError: it cannot be read.
    """
    return Progress(**_read_state(Path(folder))["progress"])


def load_averages(folder: str | os.PathLike[str], denoiser: nn.Module) -> None:
    """Puts a checkpoint's moving averages in the place of the weights that they are averages of.

    Raises:
        UserError: it has none, or they are not those of the parameters that it trained (keys are named).
    """
    file = Path(folder) / _EMA
    if not file.is_file():
        raise UserError(f"checkpoint '{folder}' has no moving averages; set use_ema=false")
    averages = _load_safetensors(file)
    trained, parameters = _read_state(Path(folder))["trained"], dict(denoiser.named_parameters())
    if getattr(denoiser, "predict_net", None) is None:  # as in a pipeline
        averages = {name: average for name, average in averages.items() if not name.startswith("predict_net.")}
    check_keys(f"'{file}'", {name: parameters[name] for name in trained if name in parameters}, averages)
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)


def choose_checkpoint(output_dir: str | os.PathLike[str], resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to continue from, or None for a new run.

    `latest` in a folder without any is a new run, so that one command line serves a job that is started again and again.

    Raises:
        UserError: the named checkpoint is not there, or a new run would mix its checkpoints with those of an earlier one.
    """
    found = find_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if found:
            raise UserError(
                f"'{output_dir}' already holds {found[-1].name}; set resume_from_checkpoint=latest, or choose another output_dir"
            )
        return None
    if resume_from_checkpoint == "latest":
        return found[-1] if found else None
    path = Path(resume_from_checkpoint)
    if not is_checkpoint(path):
        there = ", ".join(folder.name for folder in found) or "none"
        raise UserError(f"'{path}' is not a checkpoint (no {_STATE} in it); '{output_dir}' holds: {there}")
    return path


def check_keys(what: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Refuses weights that are not exactly the expected ones.

    Raises:
        UserError: names missing and unexpected keys, and those of another shape.
    """
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    reshaped = [
        f"{key} {tuple(found[key].shape)} for {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & found.keys())
        if found[key].shape != expected[key].shape
    ]
    parts = [
        f"{label} {len(keys)} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
        for label, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if keys
    ]
    if parts:
        raise UserError(
            f"{what} does not fit this model: keys {'; '.join(parts)}; use the config that it was trained with"
        )


def load_component(module: nn.Module, folder: Path) -> None:
    """Loads the safetensors of a diffusers folder, every key of them and no other.

    Raises:
        UserError: no readable weights, or other keys or shapes than the module's.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files and module.state_dict():  # a condition encoder without networks has no weights
        raise UserError(f"'{folder}' holds no .safetensors file; resume from another checkpoint")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights |= _load_safetensors(file)
    check_keys(f"'{folder}'", module.state_dict(), weights)
    module.load_state_dict(weights)


class Checkpoints:
    """Saves and restores one run; made on every process after `accelerator.prepare`, which it hooks into.

    Args:
        accelerator: has prepared one model, a `Denoiser`, with its optimiser and learning-rate schedule.
        output_dir: folder of the run.
        trained: the trained parameters by name.
        ema: averages of them, in the same order, or None.
        total_limit: how many checkpoints stay; None for all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | os.PathLike[str],
        trained: Mapping[str, nn.Parameter],
        ema: EMAModel | None,
        total_limit: int | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.trained = dict(trained)
        self.ema = ema
        self.total_limit = total_limit
        accelerator.register_save_state_pre_hook(self._save_components)
        accelerator.register_load_state_pre_hook(self._load_components)

    def save(self, progress: Progress) -> Path:
        """Writes `checkpoint-{step}`, then deletes the oldest ones over the limit. Every process must call it.

        Raises:
            UserError: it cannot be written; the checkpoints before it are intact.
        """
        final = self.output_dir / f"checkpoint-{progress.step}"
        main = self.accelerator.is_main_process
        try:
            with ExitStack() as stack:
                # One process owns the rename; the others write their parts into its temporary folder.
                folder = [str(stack.enter_context(atomic_folder(final))) if main else ""]
                broadcast_object_list(folder)
                self.accelerator.save_state(folder[0])
                if main:
                    self._write_state(Path(folder[0]), progress)
                self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write '{final}' ({_first_line(error)}); make room, and resume from the one before"
            ) from error
        if main and self.total_limit is not None:
            for old in find_checkpoints(self.output_dir)[: -self.total_limit]:
                doomed = old.with_name(f".{old.name}.old")
                os.replace(old, doomed)
                shutil.rmtree(doomed)
        self.accelerator.wait_for_everyone()
        return final

    def load(self, folder: Path) -> Progress:
        """Restores everything that `save` wrote. Every process must call it.

        Raises:
            UserError: a part is missing, unreadable, or of another model.
        """
        try:
            state = _read_state(folder)
            self._check_trained(folder, state["trained"])
            self.accelerator.load_state(str(folder))
            if self.ema is not None:
                weights = _load_safetensors(folder / _EMA)
                check_keys(f"'{folder / _EMA}'", self.trained, weights)
                device = next(iter(self.trained.values())).device
                self.ema.shadow_params = [weights[name].to(device) for name in self.trained]
                self.ema.optimization_step = state["ema_step"]
            return Progress(**state["progress"])
        except (OSError, EOFError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"checkpoint '{folder}' cannot be read ({_first_line(error)}); resume from another one"
            ) from error

    def _write_state(self, folder: Path, progress: Progress) -> None:
        state: dict[str, Any] = {"progress": asdict(progress), "trained": list(self.trained)}
        if self.ema is not None:
            state["ema_step"] = self.ema.optimization_step
            averages = zip(self.trained, self.ema.shadow_params, strict=True)
            save_file({name: average.contiguous() for name, average in averages}, folder / _EMA)
        (folder / _STATE).write_text(json.dumps(state, indent=1))

    def _check_trained(self, folder: Path, names: list[str]) -> None:
        missing, unexpected = set(self.trained) - set(names), set(names) - set(self.trained)
        if missing or unexpected:
            example = sorted(missing or unexpected)[0]
            raise UserError(
                f"checkpoint '{folder}' trained other parameters ({len(missing)} missing, {len(unexpected)} unexpected, such as "
                f"{example}); use the same model and the same train=temporal|all"
            )
        if self.ema is not None and not (folder / _EMA).is_file():
            raise UserError(f"checkpoint '{folder}' has no moving averages; set use_ema=false")

    def _save_components(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # or accelerate would write them once more
        if self.accelerator.is_main_process:
            denoiser = self.accelerator.unwrap_model(models[0])
            for name, component in denoiser.named_children():
                component.save_pretrained(Path(folder) / name)

    def _load_components(self, models: list[nn.Module], folder: str) -> None:
        denoiser = self.accelerator.unwrap_model(models.pop())
        for name, component in denoiser.named_children():
            load_component(component, Path(folder) / name)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint '{folder}' cannot be read ({_first_line(error)}); use another one") from None


def _load_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{file}' cannot be read ({_first_line(error)}); resume from another checkpoint") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
