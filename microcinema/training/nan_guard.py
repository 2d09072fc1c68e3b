"""Stops a run whose loss or gradient is not finite, and keeps the clips that it met."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path

FOLDER = "not_finite"


class Guard:
    """Holds what this process trains on in one step of the optimiser until it is known to be sound.

    Args:
        output_dir: folder of the run; clips are kept in its `not_finite/step-{step}-rank-{rank}.safetensors`: `numbers`, `latents`, `t`
            and `losses` of each, and as metadata `step`, `seed` and `clips`, a JSON list of number, id and caption. Seed and number
            decide the noise, too.
        seed: of the run.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, seed: int) -> None:
        self.accelerator = accelerator
        self.folder = output_dir / FOLDER
        self.seed = seed
        self._tensors: list[dict[str, torch.Tensor]] = []
        self._clips: list[dict[str, Any]] = []

    def hold(self, items: Mapping[str, Any], latents: torch.Tensor, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Takes a micro-batch.

        Args:
            items: as the loader brought it: `sample_index` and `caption`, `id` if there is one.
            latents: (b, f, c, h, w).
            t, losses: (b,).
        """
        numbers = items["sample_index"]
        self._tensors.append({"numbers": numbers, "latents": latents, "t": t, "losses": losses.detach()})
        ids = items.get("id", [None] * len(numbers))
        captions = items.get("caption", [None] * len(numbers))
        for number, clip, caption in zip(numbers.tolist(), ids, captions, strict=True):
            self._clips.append({"number": number, "id": None if clip is None else str(clip), "caption": caption})

    def check(self, step: int, losses: torch.Tensor, norm: float | None) -> None:
        """Lets go of a step that is sound. Every process must call it, with the same arguments.

        Args:
            step: of the optimiser, counted from 1.
            losses: of every clip, by process, (processes, clips).
            norm: of the gradient; None where it says nothing, as when a loss scale was too large.

        Raises:
            UserError: a loss or the norm is not finite; the clips of the processes that met it, or of all, are kept.
        """
        finite = losses.isfinite().all(dim=1)
        if finite.all() and (norm is None or math.isfinite(norm)):
            self._tensors.clear()
            self._clips.clear()
            return
        found = f"the loss is {losses.mean().item()}" if not finite.all() else f"the norm of the gradient is {norm}"
        met = [rank for rank, sound in enumerate(finite.tolist()) if not sound] or list(range(len(finite)))
        if self.accelerator.process_index in met:
            self._keep(self._path(step, self.accelerator.process_index), step)
        self.accelerator.wait_for_everyone()  # the first process that ends takes the others with it
        more = f" and {len(met) - 1} more" if len(met) > 1 else ""
        raise UserError(
            f"{found} at step {step}; its clips are kept in '{self._path(step, met[0])}'{more}; "
            "lower learning_rate or use mixed_precision=no, and resume from the last checkpoint"
        )

    def _path(self, step: int, rank: int) -> Path:
        return self.folder / f"step-{step}-rank-{rank:05d}.safetensors"

    def _keep(self, path: Path, step: int) -> None:
        tensors = {name: torch.cat([part[name].cpu() for part in self._tensors]) for name in self._tensors[0]}
        about = {"step": str(step), "seed": str(self.seed), "clips": json.dumps(self._clips, ensure_ascii=False)}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=about)
