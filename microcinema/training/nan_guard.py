"""Stops a run whose loss or gradient is not finite, and saves the clips of that step."""

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


class NanGuard:
    """Keeps the clips of this process until their optimizer step is known to be finite.

    Args:
        output_dir: clips are saved in it as `not_finite/step-{step}-rank-{rank}.safetensors`: `numbers`, `latents`, `t` and `losses`
            of each, and as metadata `step`, `seed` and `clips`, a JSON list of number, id and caption.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, seed: int) -> None:
        self.accelerator = accelerator
        self.folder = output_dir / FOLDER
        self.seed = seed
        self._tensors: list[dict[str, torch.Tensor]] = []
        self._clips: list[dict[str, Any]] = []

    def record(self, items: Mapping[str, Any], latents: torch.Tensor, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Adds a micro-batch with `latents` (b, f, c, h, w), `t` and `losses` (b,)."""
        indices = items["sample_index"]
        self._tensors.append({"numbers": indices, "latents": latents, "t": t, "losses": losses.detach()})
        ids = items.get("id", [None] * len(indices))
        captions = items.get("caption", [None] * len(indices))
        for index, clip_id, caption in zip(indices.tolist(), ids, captions, strict=True):
            self._clips.append({"number": index, "id": None if clip_id is None else str(clip_id), "caption": caption})

    def assert_finite(self, step: int, losses: torch.Tensor, grad_norm: float | None) -> None:
        """Discards the clips of a finite step. Collective, with the same arguments on every rank.

        Args:
            losses: of every clip, by process, (processes, clips).
            grad_norm: None if it tells nothing, as when the loss scale was too large.

        Raises:
            UserError: a loss or the norm is not finite; the clips of the ranks that had it, or of all, are saved.
        """
        is_finite = losses.isfinite().all(dim=1)
        if is_finite.all() and (grad_norm is None or math.isfinite(grad_norm)):
            self._tensors.clear()
            self._clips.clear()
            return
        problem = f"the loss is {losses.mean().item()}" if not is_finite.all() else f"the gradient norm is {grad_norm}"
        ranks = [rank for rank, finite in enumerate(is_finite.tolist()) if not finite] or list(range(len(is_finite)))
        if self.accelerator.process_index in ranks:
            self._save(self._path(step, self.accelerator.process_index), step)
        self.accelerator.wait_for_everyone()  # the first process to exit takes the others with it
        more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
        fault = f"{problem} at step {step}; its clips are saved in '{self._path(step, ranks[0])}'{more}"
        advice = "lower learning_rate or use mixed_precision=no, and resume from the last checkpoint"
        raise UserError(f"{fault}; {advice}")

    def _path(self, step: int, rank: int) -> Path:
        return self.folder / f"step-{step}-rank-{rank:05d}.safetensors"

    def _save(self, path: Path, step: int) -> None:
        tensors = {name: torch.cat([batch[name].cpu() for batch in self._tensors]) for name in self._tensors[0]}
        metadata = {"step": str(step), "seed": str(self.seed), "clips": json.dumps(self._clips, ensure_ascii=False)}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
