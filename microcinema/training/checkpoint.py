"""Checkpoints: `output_dir/checkpoint-{step}/`, complete or absent, written by every process that holds a part of the state.

checkpoint-1000/
  unet/  predict_net/           diffusers folders, as in a pipeline
  ema.safetensors               moving averages of the trained parameters, by name
  optimizer.bin  scheduler.bin  random_states_{rank}.pkl  and what else accelerate saves (scaler, shards)
  training_state.json           step, index of the next clip, names of the trained parameters, identity of the run
  SHA256SUMS                    checksums of all of these
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
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

from microcinema.training import distributed
from microcinema.training.resume import STATE, Identity, Progress, check_identity, find_checkpoints, read_state
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import atomic_folder, partial
from microcinema.utils.hashing import write_checksums

_UNREAD = 2**61 - 1  # no run has this seed
EMA = "ema.safetensors"
# What libraries raise when a file cannot be written or read; torch reports a full disk as RuntimeError.
_IO_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)


@dataclass
class Checkpoints:
    """Saves and restores the state of one run. To be made on every rank, after `accelerator.prepare`.

    Args:
        accelerator: saves the optimizer, the learning-rate schedule and the random states.
        model: the prepared `TrainableModel`; each of its children is saved as a folder of its own.
        ema: averages of `trained`, in the same order.
        total_limit: number of checkpoints to keep; None keeps all.
        identity: of the run, checked on loading; None accepts any checkpoint.
    """

    accelerator: Accelerator
    output_dir: Path
    model: nn.Module
    trained: Mapping[str, nn.Parameter]
    ema: EMAModel | None
    total_limit: int | None = None
    identity: Identity | None = None

    def __post_init__(self) -> None:
        self.accelerator.register_save_state_pre_hook(self._save_networks)
        self.accelerator.register_load_state_pre_hook(self._load_networks)

    def save(self, progress: Progress) -> Path:
        """Writes `checkpoint-{step}`, or raises a UserError and changes none; deletes those over the limit. Collective."""
        final = self.output_dir / f"checkpoint-{progress.step}"
        is_main = self.accelerator.is_main_process

        def all_ranks() -> AbstractContextManager[None]:
            message = f"cannot write '{final}' ({{reason}}); make room, and resume from the one before"
            return distributed.raise_on_all_ranks(message, (*_IO_ERRORS, UserError))

        with ExitStack() as stack:
            # The main process owns the rename; the others write their shards into its temporary folder.
            folder = [""]
            with all_ranks():
                folder = [str(stack.enter_context(atomic_folder(final))) if is_main else ""]
            broadcast_object_list(folder)
            with all_ranks():
                self.accelerator.save_state(folder[0])
                self._save_ema(Path(folder[0]))
            with all_ranks():
                if is_main:
                    self._write_state(Path(folder[0]), progress)
                    write_checksums(folder[0])
                    stack.close()
        if is_main and self.total_limit is not None:
            for checkpoint in find_checkpoints(self.output_dir, progress.step)[: -self.total_limit]:
                shutil.rmtree(checkpoint.rename(partial(checkpoint)))
        self.accelerator.wait_for_everyone()
        return final

    def load(self, folder: Path) -> Progress:
        """Restores what `save` wrote; a UserError if a file is unreadable or of another model or run. Collective."""
        with user_errors(f"checkpoint '{folder}' cannot be read ({{reason}}); use another one"):
            state = read_state(folder)
            self._check_trained(folder, state["trained"])
            for name, network in self._networks():
                _check_tensors(
                    f"'{folder / name}'", distributed.unsharded_shapes(network), _saved_shapes(folder / name)
                )
            if self.identity is not None and (changes := check_identity(folder, state["run"], self.identity)):
                self.accelerator.print(f"resuming {folder.name} with other settings: {'; '.join(changes)}")
            self._load_state(folder)
            if self.ema is not None:
                weights = load_safetensors([folder / EMA])
                _check_tensors(f"'{folder / EMA}'", self.trained, weights)
                self.ema.shadow_params = [
                    distributed.shard_like(weights[name], like) for name, like in self.trained.items()
                ]
                self.ema.optimization_step = state["ema_step"]
            return Progress(**state["progress"])

    def _load_state(self, folder: Path) -> None:
        """What accelerate restores; random states that it cannot read, which it skips without a word, are told."""
        generator, before = torch.default_generator, torch.get_rng_state()
        unread = generator.manual_seed(_UNREAD).get_state()
        self.accelerator.load_state(str(folder))
        if torch.equal(generator.get_state(), unread):
            generator.set_state(before)
            rank = self.accelerator.process_index
            print(f"the random states of process {rank} are not restored from '{folder}': dropout will differ")

    def _networks(self) -> Iterable[tuple[str, Any]]:
        return self.accelerator.unwrap_model(self.model).named_children()

    def _save_ema(self, folder: Path) -> None:
        if self.ema is None:
            return
        averages = {}
        for name, average in zip(self.trained, self.ema.shadow_params, strict=True):
            full = distributed.unshard(average)
            if self.accelerator.is_main_process:
                averages[name] = full.contiguous().cpu()
        if averages:
            save_file(averages, folder / EMA)

    def _write_state(self, folder: Path, progress: Progress) -> None:
        state = {"progress": asdict(progress), "trained": list(self.trained), "run": self.identity}
        if self.ema is not None:
            state["ema_step"] = self.ema.optimization_step
        (folder / STATE).write_text(json.dumps(state, indent=1))

    def _check_trained(self, folder: Path, names: list[str]) -> None:
        missing, unexpected = set(self.trained) - set(names), set(names) - set(self.trained)
        if missing or unexpected:
            raise UserError(
                f"checkpoint '{folder}' trained other parameters ({len(missing)} missing, {len(unexpected)} unexpected, such as "
                f"{sorted(missing or unexpected)[0]}); use the same model and the same trainable_parameters=temporal|all"
            )
        if self.ema is not None and not (folder / EMA).is_file():
            raise UserError(f"checkpoint '{folder}' has no moving averages; set use_ema=false")

    def _save_networks(self, models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        weights.clear()  # otherwise accelerate saves them a second time
        is_main = self.accelerator.is_main_process
        for name, network in self._networks():
            if distributed.is_sharded(network):
                state = distributed.unsharded_state(network, keep=is_main)
                network = distributed.gathered_copy(network, state) if is_main else None
            if is_main:
                network.save_pretrained(Path(folder) / name)

    def _load_networks(self, models: list[nn.Module], folder: str) -> None:
        for name, network in self._networks() if models else ():  # none if accelerate has loaded the shards itself
            network.load_state_dict(load_safetensors(_weight_files(Path(folder) / name)))
        models.clear()


def load_ema(folder: str | Path, model: nn.Module) -> None:
    """Replaces the trained weights of a `TrainableModel` by the averages in a checkpoint; a UserError if they do not fit."""
    file = Path(folder) / EMA
    if not file.is_file():
        raise UserError(f"checkpoint '{folder}' has no moving averages; set use_ema=false")
    averages, parameters = load_safetensors([file]), dict(model.named_parameters())
    if getattr(model, "predict_net", None) is None:  # as in a pipeline
        averages = {name: average for name, average in averages.items() if not name.startswith("predict_net.")}
    trained = {name: parameters[name] for name in read_state(folder)["trained"] if name in parameters}
    _check_tensors(f"'{file}'", trained, averages)
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)


def _check_tensors(source: str, expected: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> None:
    """Checks that the loaded tensors have exactly the expected names and shapes; the error lists those that do not."""
    shared = sorted(expected.keys() & loaded.keys())
    shapes = {key: (tuple(loaded[key].shape), tuple(expected[key].shape)) for key in shared}
    problems = {
        "missing": sorted(expected.keys() - loaded.keys()),
        "unexpected": sorted(loaded.keys() - expected.keys()),
        "of another shape": [f"{key} {old} for {new}" for key, (old, new) in shapes.items() if old != new],
    }
    text = "; ".join(
        f"{problem} {len(keys)} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
        for problem, keys in problems.items()
        if keys
    )
    if text:
        raise UserError(f"{source} does not fit this model: keys {text}; use the config that it was trained with")


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"'{folder}' holds no .safetensors file; resume from another checkpoint")
    return files


def load_safetensors(files: Iterable[Path], advice: str = "resume from another checkpoint") -> dict[str, torch.Tensor]:
    """All tensors of some files, by name; a UserError with this advice if one cannot be read."""
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        with user_errors(f"'{file}' cannot be read ({{reason}}); {advice}"):
            weights |= load_file(file)
    return weights


def _saved_shapes(folder: Path) -> dict[str, torch.Tensor]:
    """A network's saved tensors as meta tensors; only the headers of the files are read."""
    shapes = {}
    for file in _weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                shapes[key] = torch.empty(tensors.get_slice(key).get_shape(), device="meta")
    return shapes
