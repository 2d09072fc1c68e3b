"""Times the parts of training steps, by the regions that the trainer marks."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from microcinema.config.schema import Train
from microcinema.training.build import build_trainer

WARM_UP = 2  # steps
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


def measure(config: Train, steps: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Times the training steps of a run; medians over steps. Collective.

    Args:
        config: its output_dir should be a new folder.
        steps: to measure, after two that do not count; as many clips are read.
        clock: `time.process_time` for the time of this process alone, on a machine that others use.

    Returns:
        Seconds of the whole `step`, of each of `PARTS`, of `other`, and of `communication` between several processes. Also
        `decoding`, seconds in which one worker reads a clip; `data_wait`, the share of the step spent waiting for the workers, by
        the wall clock; `clips` of this process in a step; `peak_memory_gib`.
    """
    total = WARM_UP + steps
    changes: dict[str, Any] = {"max_train_steps": total, "checkpointing_steps": total, "validation_prompts": []}
    config = replace(config, **changes, validation_data=None, report_to=None, resume_from_checkpoint=None)
    timer = StepTimer(clock)
    trainer = build_trainer(config, timer.on_metrics, timer.region)
    if isinstance(trainer.model, DistributedDataParallel):
        trainer.model.register_comm_hook(None, timer.communication)
    decoding = []
    for index in range(total):
        start = clock()
        trainer.clips[index]
        decoding.append(clock() - start)
    trainer.train()
    trainer.accelerator.end_training()

    measured = timer.steps[-steps:]
    parts = ("step", *PARTS, *(["communication"] if "communication" in measured[-1] else []))
    seconds = {part: statistics.median(step.get(part, 0.0) for step in measured) for part in parts}
    seconds["other"] = max(0.0, seconds["step"] - sum(seconds[part] for part in PARTS))
    seconds["decoding"] = statistics.median(decoding[WARM_UP:])
    return seconds | {
        "data_wait": statistics.median(metrics["data_wait"] for metrics in timer.metrics[-steps:]),
        "peak_memory_gib": timer.metrics[-1]["peak_memory_gib"],
        "clips": config.train_batch_size * config.gradient_accumulation_steps,
    }
