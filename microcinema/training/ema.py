"""A model in training as it would be used: whole, in evaluation, with averaged weights."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training.distributed import gathered_copy, is_sharded, unsharded_state


@contextmanager
def averaged(ema: EMAModel | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within it the parameters hold their averages."""
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
def evaluated(
    accelerator: Accelerator,
    pipeline: ImageToVideoPipeline,
    denoiser: nn.Module,
    ema: EMAModel | None,
    trained: Mapping[str, nn.Parameter],
) -> Iterator[ImageToVideoPipeline]:
    """The pipeline as it would be used, in every process, each for itself: whole, with averaged weights. Every process must enter it.

    Args:
        denoiser: prepared by the accelerator.
        trained: the parameters that `ema` averages, by name.
    """
    if not is_sharded(denoiser):
        denoiser.eval()
        try:
            with averaged(ema, list(trained.values())):
                yield pipeline
        finally:
            denoiser.train()
        return
    averages = dict(zip(trained, ema.shadow_params, strict=True)) if ema else {}
    twin = copy.copy(pipeline)
    for name in ("unet", "condition_encoder"):
        own = {key.removeprefix(f"{name}."): value for key, value in averages.items() if key.startswith(f"{name}.")}
        component = getattr(pipeline, name)
        setattr(twin, name, gathered_copy(component, unsharded_state(component, own)).to(accelerator.device))
    yield twin
