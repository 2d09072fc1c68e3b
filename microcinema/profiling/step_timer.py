"""Where the time of a training step goes: a few steps of the trainer itself, with a watch at the doors of its parts."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from microcinema.data.indexed import IndexedDataset
from microcinema.data.source import ClipSource
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training import trainer

if TYPE_CHECKING:
    from omegaconf import DictConfig

WARM_UP = 2  # steps
PARTS = ("VAE", "encoders", "forward", "backward", "optimiser")
"""What a step does one after the other; what is left of it is all else: drawing noise, clipping, averages, waiting for clips."""

Clock = Callable[[], float]


class Watch:
    """Seconds of each part of the steps of a run, on one clock.

    On a GPU it waits at every door for what was begun before, without which a part would be told the time of another.

    Attributes:
        figures: of the steps, as they are logged.
        steps: one entry for each optimiser step, part to seconds; `step` is the whole. The communication goes on while the backward runs
            and is a part of it, told by the clock on the wall.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.steps: list[dict[str, float]] = []
        self.figures: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._open: dict[str, float] = {}
        self._last: float | None = None

    def enter(self, part: str) -> None:
        """A part begins."""
        self._open[part] = self._read()

    def leave(self, part: str) -> None:
        """It ends."""
        self._now[part] += self._read() - self._open.pop(part)

    def listen(self, figures: dict[str, float]) -> None:
        """Ends a step when its figures are told."""
        now = self._read()
        if "loss" in figures:
            if self._last is not None:  # the first has no beginning that is known
                self.steps.append({**self._now, "step": now - self._last})
                self.figures.append(figures)
            self._now.clear()
        self._last = now

    def around(self, module: nn.Module | None, part: str) -> None:
        """Watches the forward of a network."""
        if module is not None:
            module.register_forward_pre_hook(lambda *_: self.enter(part))
            module.register_forward_hook(lambda *_: self.leave(part))

    def calls(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, watched."""

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave(part)

        return watched

    def communication(self, _: Any, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Averages a bucket of gradients over the processes as DistributedDataParallel does, and takes the time of it."""
        began = time.perf_counter()
        gradient = bucket.buffer().div_(distributed.get_world_size())

        def done(future: torch.futures.Future[Any]) -> torch.Tensor:
            self._now["communication"] += time.perf_counter() - began
            return future.value()[0]

        return distributed.all_reduce(gradient, async_op=True).get_future().then(done)

    def _read(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.clock()


@contextmanager
def watching(watch: Watch, accelerator: Accelerator, pipeline: ImageToVideoPipeline) -> Iterator[None]:
    """Within it the trainer's use of these objects, which are for one run, is watched."""
    watch.around(pipeline.vae.encoder, "VAE")
    for encoder in (pipeline.text_encoder, pipeline.image_encoder, pipeline.motion_encoder):
        watch.around(encoder, "encoders")
    prepare = accelerator.prepare

    def prepared(denoiser: nn.Module, optimizer: torch.optim.Optimizer, *others: Any) -> Any:
        watch.around(denoiser, "forward")
        optimizer.register_step_pre_hook(lambda *_: watch.enter("optimiser"))
        optimizer.register_step_post_hook(lambda *_: watch.leave("optimiser"))
        denoiser, *rest = prepare(denoiser, optimizer, *others)
        if isinstance(denoiser, DistributedDataParallel):
            denoiser.register_comm_hook(None, watch.communication)
        return denoiser, *rest

    backward = watch.calls(accelerator.backward, "backward")
    with patch.object(accelerator, "prepare", prepared), patch.object(accelerator, "backward", backward):
        yield


def measure(config: "DictConfig", steps: int, clock: Clock = time.perf_counter) -> dict[str, float]:
    """What a step of a run takes, medians over steps.

    Args:
        config: of the command `train`. What the run writes stays in its output_dir, which is to be a new one.
        steps: to measure, after two that do not count; as many clips are read.
        clock: `time.process_time` for the time of this process alone, on a machine that others use.

    Returns:
        Seconds of the whole `step`, of each of `PARTS`, of `other`, and of `communication` between several processes. Beside these
        `decoding`, seconds in which one worker reads a clip; `data_wait`, the share of the step that is spent waiting for the workers, by the
        clock on the wall; `clips` of this process in a step; `peak_memory_gib`.

    Raises:
        UserError: as the run would.
    """
    from omegaconf import OmegaConf

    total = WARM_UP + steps
    changes: dict[str, Any] = {"max_train_steps": total, "checkpointing_steps": total, "validation_prompts": []}
    config = OmegaConf.merge(config, changes | {"report_to": None, "resume_from_checkpoint": None})  # type: ignore[assignment]
    watch, train, read = Watch(clock), trainer.train, [0.0] * total

    def watched(accelerator: Accelerator, pipeline: ImageToVideoPipeline, dataset: ClipSource, *others: Any) -> Any:
        numbered = IndexedDataset(dataset, config.seed)
        for number in range(total):
            began = clock()
            numbered[number]
            read[number] = clock() - began
        with watching(watch, accelerator, pipeline):
            return train(accelerator, pipeline, dataset, *others)

    with patch.object(trainer, "train", watched):
        trainer.run(config, watch.listen)
    counted = watch.steps[-steps:]
    parts = ("step", *PARTS, *(["communication"] if "communication" in counted[-1] else []))
    found = {part: statistics.median(step.get(part, 0.0) for step in counted) for part in parts}
    found["other"] = max(0.0, found["step"] - sum(found[part] for part in PARTS))
    found["decoding"] = statistics.median(read[WARM_UP:])
    found["data_wait"] = statistics.median(figures["data_wait"] for figures in watch.figures[-steps:])
    found["peak_memory_gib"] = watch.figures[-1]["peak_memory_gib"]
    return {**found, "clips": config.train_batch_size * config.gradient_accumulation_steps}
