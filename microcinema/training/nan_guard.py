"""Stops a run whose loss or gradient is not finite, and saves the clips of that step."""

import json
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
    """Keeps the clips of this process, on the device, until their optimizer steps are known to be finite.

    Args:
        output_dir: clips are saved in it as `not_finite/step-{step}-rank-{rank}.safetensors`: `numbers`, `latents`, `t` and `losses`
            of each, and as metadata `step`, `seed` and `clips`, a JSON list of number, id and caption.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, seed: int) -> None:
        self.accelerator = accelerator
        self.folder = output_dir / FOLDER
        self.seed = seed
        self._batches: list[tuple[int, dict[str, torch.Tensor], list[dict[str, Any]]]] = []

    def record(
        self, step: int, items: Mapping[str, Any], latents: torch.Tensor, t: torch.Tensor, losses: torch.Tensor
    ) -> None:
        """Adds a micro-batch of a step, with `latents` (b, f, c, h, w), `t` and `losses` (b,)."""
        indices, clips = items["sample_index"], list[dict[str, Any]]()
        ids = items.get("id", [None] * len(indices))
        captions = items.get("caption", [None] * len(indices))
        for index, clip_id, caption in zip(indices.tolist(), ids, captions, strict=True):
            clips.append({"number": index, "id": None if clip_id is None else str(clip_id), "caption": caption})
        self._batches.append((step, {"numbers": indices, "latents": latents, "t": t, "losses": losses.detach()}, clips))

    def assert_finite(self, losses: torch.Tensor, grad_norms: torch.Tensor) -> None:
        """Discards the recorded clips if their steps were finite. Collective, with the same arguments on every rank.

        Args:
            losses: of every clip of these steps, by process, (steps, processes, clips).
            grad_norms: (steps,), or empty if they tell nothing, as with a loss scale, which may be too large.

        Raises:
            UserError: a loss or a norm is not finite; of the first such step, the clips of the ranks that had it, or of all, are saved.
        """
        norms = grad_norms if len(grad_norms) else torch.zeros(len(losses))
        faults = ~(losses.isfinite().all(dim=(1, 2)) & norms.isfinite())
        if not faults.any():
            self._batches.clear()
            return
        first = int(faults.int().argmax())
        step, loss, is_finite = self._batches[0][0] + first, losses[first], losses[first].isfinite().all(dim=1)
        problem = f"the loss is {loss.mean():g}" if not is_finite.all() else f"the gradient norm is {norms[first]:g}"
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
        batches = [(tensors, clips) for number, tensors, clips in self._batches if number == step]
        tensors = {name: torch.cat([batch[name].cpu() for batch, _ in batches]) for name in batches[0][0]}
        clips = json.dumps([clip for _, clips in batches for clip in clips], ensure_ascii=False)
        metadata = {"step": str(step), "seed": str(self.seed), "clips": clips}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
