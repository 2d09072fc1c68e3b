"""Metrics of training steps: losses over all ranks; times, operations and memory of this process."""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from einops import rearrange

from microcinema.training.mfu import ModelFlops, peak_flops

QUARTILES = 4
GIB = 2**30
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T")


class StepMetrics:
    """Collects the clips of the optimizer steps between two readings, on the device, over micro-batches and processes.

    Losses are logged by quarter of the schedule too, `loss/t1` (least noise) to `loss/t4`.

    Attributes:
        losses: of every clip of the last interval, by step and process, (steps, processes, clips).
        grad_norms: of its steps, (steps,); empty if they are not known.
    """

    def __init__(self, accelerator: Accelerator, num_train_timesteps: int) -> None:
        self.accelerator = accelerator
        self.num_train_timesteps = num_train_timesteps
        self.losses, self.grad_norms = torch.empty(0, accelerator.num_processes, 0), torch.empty(0)
        self.paused_seconds = 0.0
        self._rows: list[torch.Tensor] = []
        self._grad_norms: list[torch.Tensor] = []
        self._steps = 0
        self._recent: deque[float] = deque(maxlen=50)
        self._data_wait = 0.0
        self._flops = 0
        self._flops_by_shape: dict[torch.Size, int] = {}
        self._peak_flops = peak_flops(accelerator.device, _DTYPES.get(accelerator.mixed_precision, torch.float32))
        self._start = time.perf_counter()

    def timed_iterator(self, batches: Iterator[T]) -> Generator[T, None, None]:
        """The same batches; the seconds until each arrives count as `data_wait`."""
        start = time.perf_counter()
        for batch in batches:
            self._data_wait += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    @contextmanager
    def count_flops(self, items: Mapping[str, Any]) -> Iterator[None]:
        """Around forward and backward of a micro-batch: counts its operations, the first time that this shape occurs."""
        shape = items["latents" if "latents" in items else "video"].shape
        flops = ModelFlops()
        with nullcontext() if shape in self._flops_by_shape else flops:
            yield
        self.add_flops(shape, lambda: flops.total)

    def add_flops(self, shape: torch.Size, count: Callable[[], int]) -> None:
        """Adds the operations of a micro-batch, which are counted the first time that this shape occurs."""
        if shape not in self._flops_by_shape:
            self._flops_by_shape[shape] = count()
        self._flops += self._flops_by_shape[shape]

    def add(self, loss: torch.Tensor, t: torch.Tensor, flow_loss: torch.Tensor | None = None) -> None:
        """Adds a micro-batch: loss, timestep and PredictNet's loss, if there is one, of every clip, (b,)."""
        rows = [loss.detach().float(), t.float(), *([] if flow_loss is None else [flow_loss.detach().float()])]
        self._rows.append(torch.stack(rows))

    def end_step(self, grad_norm: torch.Tensor | None) -> None:
        """Ends a step; reads nothing."""
        self._steps += 1
        if grad_norm is not None:
            self._grad_norms.append(grad_norm)

    def finish_interval(self) -> dict[str, float]:
        """The metrics of the steps since the last call, means over their clips; starts the next interval. Collective: one gather."""
        # gather concatenates along the first axis, hence b k.
        rows = self.accelerator.gather(rearrange(torch.cat(self._rows, dim=1), "k b -> b k")).double().cpu()
        self.losses = rearrange(rows[:, 0], "(p s b) -> s p b", p=self.accelerator.num_processes, s=self._steps)
        self.grad_norms = torch.stack(self._grad_norms).cpu() if self._grad_norms else torch.empty(0)
        losses, quarter = rows[:, 0], (rows[:, 1] * QUARTILES / self.num_train_timesteps).long()
        seconds = time.perf_counter() - self._start
        metrics = {
            "loss": losses.mean().item(),
            "clips_per_second": len(losses) / seconds,
            "data_wait": self._data_wait / seconds,
            "mfu": self._flops / seconds / self._peak_flops,
            "peak_memory_gib": peak_memory(self.accelerator.device) / GIB,
        }
        for k in range(QUARTILES):
            if (quarter == k).any():
                metrics[f"loss/t{k + 1}"] = losses[quarter == k].mean().item()
        if rows.shape[1] > 2:
            metrics["loss/flow"] = rows[:, 2].mean().item()
        if len(self.grad_norms):
            metrics["grad_norm"] = self.grad_norms.mean().item()
        self._recent.extend(self.losses.mean(dim=(1, 2)).tolist())
        self.start_interval()
        return metrics

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around a checkpoint or a validation, which are no part of a step: measures them, then starts the next interval."""
        start = time.perf_counter()
        yield
        self.paused_seconds = time.perf_counter() - start
        self.start_interval()

    def start_interval(self) -> None:
        """Clears what was collected and starts the clock."""
        self._rows.clear()
        self._grad_norms.clear()
        self._steps = 0
        self._data_wait = 0.0
        self._flops = 0
        self._start = time.perf_counter()

    @property
    def recent_loss(self) -> float:
        """Mean loss of the last 50 steps, for the progress bar: the loss of one step mostly reflects its noise levels."""
        return sum(self._recent) / len(self._recent)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of tensors on a GPU; on a CPU the resident size of this process, code included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
