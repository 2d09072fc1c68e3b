"""Checkpoints that resume: `output_dir/checkpoint-{step}/`, whole or absent, written by every process that holds a part.

checkpoint-1000/
  unet/  condition_encoder/     diffusers folders, as in a pipeline
  ema.safetensors               moving averages of the trained parameters, by name
  optimizer.bin  scheduler.bin  random_states_{rank}.pkl  and what else accelerate saves (scaler, shards)
  training_state.json           step, number of the next clip, names of the trained parameters, identity of the run
  SHA256SUMS                    checksums of all of these
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from microcinema.training.distributed import gather, gather_state, gathered_copy, is_sharded, shard_like, whole_shapes
from microcinema.training.identity import Identity, compare
from microcinema.training.processes import first_error
from microcinema.training.resume import STATE, Progress, find_checkpoints, read_state
from microcinema.utils.errors import UserError, first_line
from microcinema.utils.files import atomic_folder
from microcinema.utils.hashing import write_checksums

_EMA = "ema.safetensors"
# What libraries raise when a file cannot be written or read; torch's writer of archives says RuntimeError of a full disk.
_FAILURES = (OSError, RuntimeError, SafetensorError, CheckpointException)


def load_averages(folder: str | os.PathLike[str], denoiser: nn.Module) -> None:
    """Puts a checkpoint's moving averages in the place of the weights that they are averages of.

    Raises:
        UserError: it has none, or they are not those of the parameters that it trained (keys are named).
    """
    file = Path(folder) / _EMA
    if not file.is_file():
        raise UserError(f"checkpoint '{folder}' has no moving averages; set use_ema=false")
    averages = _load_safetensors(file)
    trained, parameters = read_state(Path(folder))["trained"], dict(denoiser.named_parameters())
    if getattr(denoiser, "predict_net", None) is None:  # as in a pipeline
        averages = {name: average for name, average in averages.items() if not name.startswith("predict_net.")}
    check_keys(f"'{file}'", {name: parameters[name] for name in trained if name in parameters}, averages)
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)


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


class Checkpoints:
    """Saves and restores one run; made on every process after `accelerator.prepare`, which it hooks into.

    Args:
        accelerator: has prepared one model, a `TrainableModel`, with its optimiser and learning-rate schedule.
        output_dir: folder of the run.
        trained: the trained parameters by name.
        ema: averages of them, in the same order, or None.
        total_limit: how many checkpoints stay; None for all.
        identity: of the run, which a checkpoint has to share; None: any will do.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | os.PathLike[str],
        trained: Mapping[str, nn.Parameter],
        ema: EMAModel | None,
        total_limit: int | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.trained = dict(trained)
        self.ema = ema
        self.total_limit = total_limit
        self.identity = identity
        accelerator.register_save_state_pre_hook(self._save_components)
        accelerator.register_load_state_pre_hook(self._load_components)

    def save(self, progress: Progress) -> Path:
        """Writes `checkpoint-{step}`, then deletes the oldest ones over the limit. Every process must call it.

        Raises:
            UserError: it cannot be written; the checkpoints before it are intact.
        """
        final = self.output_dir / f"checkpoint-{progress.step}"
        main = self.accelerator.is_main_process
        with ExitStack() as stack:
            # One process owns the rename; the others write their parts into its temporary folder.
            folder = [""]
            with self._together(final):
                folder = [str(stack.enter_context(atomic_folder(final))) if main else ""]
            broadcast_object_list(folder)
            with self._together(final):
                self.accelerator.save_state(folder[0])
                self._save_averages(Path(folder[0]))
            with self._together(final):
                if main:
                    self._write_state(Path(folder[0]), progress)
                    write_checksums(folder[0])
                    stack.close()
        if main and self.total_limit is not None:
            for old in find_checkpoints(self.output_dir, progress.step)[: -self.total_limit]:
                doomed = old.with_name(f".{old.name}.partial")
                os.replace(old, doomed)
                shutil.rmtree(doomed)
        self.accelerator.wait_for_everyone()
        return final

    def load(self, folder: Path) -> Progress:
        """Restores everything that `save` wrote. Every process must call it.

        Raises:
            UserError: a part is missing, unreadable, or of another model or run.
        """
        try:
            state = read_state(folder)
            self._check_trained(folder, state["trained"])
            self._check_components(folder)
            if self.identity is not None and (other := compare(f"checkpoint '{folder}'", state["run"], self.identity)):
                self.accelerator.print(f"resuming {folder.name} with other settings: {'; '.join(other)}")
            self.accelerator.load_state(str(folder))
            if self.ema is not None:
                weights = _load_safetensors(folder / _EMA)
                check_keys(f"'{folder / _EMA}'", self.trained, weights)
                self.ema.shadow_params = [shard_like(weights[name], like) for name, like in self.trained.items()]
                self.ema.optimization_step = state["ema_step"]
            return Progress(**state["progress"])
        except (EOFError, KeyError, ValueError, pickle.UnpicklingError, *_FAILURES) as error:
            raise UserError(
                f"checkpoint '{folder}' cannot be read ({first_line(error)}); resume from another one"
            ) from error

    @contextmanager
    def _together(self, final: Path) -> Iterator[None]:
        """What fails in one process fails in all, before any of them goes on to wait for the others.

        Raises:
            UserError: something could not be written.
        """
        fault = None
        try:
            yield
        except (*_FAILURES, UserError) as error:
            fault = first_line(error)
        if (fault := first_error(fault)) is not None:
            raise UserError(f"cannot write '{final}' ({fault}); make room, and resume from the one before")

    def _save_averages(self, folder: Path) -> None:
        if self.ema is None:
            return
        averages = {}
        for name, average in zip(self.trained, self.ema.shadow_params, strict=True):
            whole = gather(average)
            if self.accelerator.is_main_process:
                averages[name] = whole.contiguous().cpu()
        if averages:
            save_file(averages, folder / _EMA)

    def _write_state(self, folder: Path, progress: Progress) -> None:
        state: dict[str, Any] = {"progress": asdict(progress), "trained": list(self.trained), "run": self.identity}
        if self.ema is not None:
            state["ema_step"] = self.ema.optimization_step
        (folder / STATE).write_text(json.dumps(state, indent=1))

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

    def _check_components(self, folder: Path) -> None:
        denoiser = self.accelerator.unwrap_model(self.accelerator._models[0])
        for name, component in denoiser.named_children():
            check_keys(f"'{folder / name}'", whole_shapes(component), _shapes(folder / name, component))

    def _save_components(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # or accelerate would write them once more
        main = self.accelerator.is_main_process
        for name, component in self.accelerator.unwrap_model(models[0]).named_children():
            if is_sharded(component):
                state = gather_state(component, keep=main)
                component = gathered_copy(component, state) if main else None
            if main:
                component.save_pretrained(Path(folder) / name)

    def _load_components(self, models: list[nn.Module], folder: str) -> None:
        while models:  # none where accelerate has loaded the parts of each process
            denoiser = self.accelerator.unwrap_model(models.pop())
            for name, component in denoiser.named_children():
                component.load_state_dict(_load_component(Path(folder) / name, component))


def _weight_files(folder: Path, component: nn.Module) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files and component.state_dict():  # a condition encoder without networks has no weights
        raise UserError(f"'{folder}' holds no .safetensors file; resume from another checkpoint")
    return files


def _load_component(folder: Path, component: nn.Module) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder, component):
        weights |= _load_safetensors(file)
    return weights


def _shapes(folder: Path, component: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a component without their contents, of which only the headers of its files tell."""
    shapes = {}
    for file in _weight_files(folder, component):
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    shapes[key] = torch.empty(opened.get_slice(key).get_shape(), device="meta")
        except (OSError, SafetensorError) as error:
            raise UserError(f"'{file}' cannot be read ({first_line(error)}); resume from another checkpoint") from None
    return shapes


def _load_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{file}' cannot be read ({first_line(error)}); resume from another checkpoint") from None
