"""What a run reports of itself at every step."""

import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from einops import rearrange

from microcinema.training.mfu import ModelFlops, peak_flops

QUARTILES = 4
GIB = 2**30
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T")


class Meter:
    """Collects the clips of one optimiser step over its micro-batches and all processes.

    Args:
        num_train_timesteps: diffusion steps; losses are also told by quarter of them, `loss/t1` (least noise) to `loss/t4`.

    Attributes:
        losses: of every clip of the step that was read last, by process, (processes, clips).
        seconds_aside: of what was last done aside.
    """

    def __init__(self, accelerator: Accelerator, num_train_timesteps: int) -> None:
        self.accelerator = accelerator
        self.num_train_timesteps = num_train_timesteps
        self.losses = torch.empty(accelerator.num_processes, 0)
        self.seconds_aside = 0.0
        self._rows: list[torch.Tensor] = []
        self._recent: deque[float] = deque(maxlen=50)
        self._waited = 0.0
        self._flops = 0
        self._flops_of: dict[tuple[int, ...], int] = {}
        self._peak = peak_flops(accelerator.device, _DTYPES.get(accelerator.mixed_precision, torch.float32))
        self._began = time.perf_counter()

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the seconds until each arrives count as `data_wait`."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield batch

    @contextmanager
    def counting(self, items: Mapping[str, Any]) -> Iterator[None]:
        """Around forward and backward of a micro-batch: counts its operations, the first time that one of this shape comes."""
        shape = tuple(items["latents" if "latents" in items else "video"].shape)
        if shape in self._flops_of:
            yield
        else:
            with ModelFlops() as flops:
                yield
            self._flops_of[shape] = flops.total
        self._flops += self._flops_of[shape]

    def add(self, loss: torch.Tensor, t: torch.Tensor, flow_loss: torch.Tensor | None = None) -> None:
        """Takes a micro-batch: loss, diffusion step and, if there is one, PredictNet's loss of every clip, (b,)."""
        rows = [loss.detach().float(), t.float(), *([] if flow_loss is None else [flow_loss.detach().float()])]
        self._rows.append(torch.stack(rows))

    def read(self) -> dict[str, float]:
        """The step's figures, times, operations and memory those of this process; begins the next step. One gather, one copy to the host."""
        # gather concatenates the first axis, hence b k.
        rows = self.accelerator.gather(rearrange(torch.cat(self._rows, dim=1), "k b -> b k")).double().cpu()
        self.losses = rearrange(rows[:, 0], "(p b) -> p b", p=self.accelerator.num_processes)
        losses, quarter = rows[:, 0], (rows[:, 1] * QUARTILES / self.num_train_timesteps).long()
        elapsed = time.perf_counter() - self._began
        figures = {
            "loss": losses.mean().item(),
            "clips_per_second": len(losses) / elapsed,
            "data_wait": self._waited / elapsed,
            "flop_utilisation": self._flops / elapsed / self._peak,
            "peak_memory_gib": peak_memory(self.accelerator.device) / GIB,
        }
        for k in range(QUARTILES):
            if (quarter == k).any():
                figures[f"loss/t{k + 1}"] = losses[quarter == k].mean().item()
        if rows.shape[1] > 2:
            figures["loss/flow"] = rows[:, 2].mean().item()
        self._recent.append(figures["loss"])
        self.start()
        return figures

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around a checkpoint or a validation, which are no training: takes their time, and begins the next step after them."""
        began = time.perf_counter()
        yield
        self.seconds_aside = time.perf_counter() - began
        self.start()

    def start(self) -> None:
        """Forgets what was collected and begins to count time."""
        self._rows.clear()
        self._waited = 0.0
        self._flops = 0
        self._began = time.perf_counter()

    @property
    def recent_loss(self) -> float:
        """Mean loss of the last 50 steps: what the progress bar shows, since the loss of one step is mostly its noise levels."""
        return sum(self._recent) / len(self._recent)


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of tensors on a GPU, elsewhere of this process as it is resident, with its code."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
