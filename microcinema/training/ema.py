"""Moving averages of the trained weights, and the model in training as it would be used: unsharded, in evaluation mode, averaged."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training.distributed import gathered_copy, is_sharded, unsharded_state


class Averages(EMAModel):
    """Moving averages as in diffusers, whose own step makes a copy of all of them."""

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Moves the averages towards the parameters, in place; shards need no communication."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)


@contextmanager
def ema_weights(ema: EMAModel | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within it the parameters hold their averages, if there are any."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


@contextmanager
def ema_pipeline(
    accelerator: Accelerator,
    pipeline: ImageToVideoPipeline,
    model: nn.Module,
    ema: EMAModel | None,
    trained: Mapping[str, nn.Parameter],
) -> Iterator[ImageToVideoPipeline]:
    """The pipeline as it would be used, complete on every rank, with averages of `trained` if there are any. Collective."""
    if not is_sharded(model):
        model.eval()
        try:
            with ema_weights(ema, list(trained.values())):
                yield pipeline
        finally:
            model.train()
        return
    averages = dict(zip(trained, ema.shadow_params, strict=True)) if ema else {}
    full = copy.copy(pipeline)
    replacements = {key.removeprefix("unet."): value for key, value in averages.items() if key.startswith("unet.")}
    state = unsharded_state(pipeline.unet, replacements)
    full.unet = gathered_copy(pipeline.unet, state).to(accelerator.device)
    yield full
