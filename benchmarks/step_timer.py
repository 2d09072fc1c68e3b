"""Times the parts of training steps, by the regions that the trainer marks."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

PARTS = ("VAE", "encoders", "forward", "backward", "optimizer")
"""Consecutive parts of a step; the rest is everything else: sampling noise, clipping, averages, waiting for clips."""


class StepTimer:
    """Seconds of each part of the steps of a run. On a GPU it synchronizes at the start and end of every region.

    Attributes:
        metrics: of the steps, as they are logged.
        steps: for each optimizer step, part to seconds; `step` is the whole. Communication overlaps with backward, is included
            in it, and is measured by the wall clock.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.steps: list[dict[str, float]] = []
        self.metrics: list[dict[str, float]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._step_start: float | None = None

    @contextmanager
    def region(self, part: str) -> Iterator[None]:
        """Adds the time of its body to a part."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[part] += self._now() - start

    def on_metrics(self, metrics: dict[str, float]) -> None:
        """Ends a step when its metrics arrive."""
        now = self._now()
        if "loss" in metrics:
            if self._step_start is not None:  # the first step has no known start
                self.steps.append({**self._seconds, "step": now - self._step_start})
                self.metrics.append(metrics)
            self._seconds.clear()
        self._step_start = now

    def communication(self, _: Any, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """A communication hook that averages gradients over the ranks as DistributedDataParallel does, and times it."""
        start = time.perf_counter()
        gradient = bucket.buffer().div_(distributed.get_world_size())

        def finished(future: torch.futures.Future[Any]) -> torch.Tensor:
            self._seconds["communication"] += time.perf_counter() - start
            return future.value()[0]

        return distributed.all_reduce(gradient, async_op=True).get_future().then(finished)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.clock()
