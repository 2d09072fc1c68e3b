"""A video UNet initialized from a video model trained earlier, by `init_weights_from`: for a further stage, or with other components."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import nn

from microcinema.diffusion.schedule import SUMMARY, make_scheduler, schedule_summary
from microcinema.pipelines.loading import (
    INDEX,
    load_index,
    load_scheduler_config,
    resolve_snapshot,
    user_error_if_damaged,
)
from microcinema.pipelines.saving import load_source_weights
from microcinema.training.checkpoint import load_safetensors
from microcinema.training.resume import is_checkpoint, read_state
from microcinema.utils.errors import UserError


@user_error_if_damaged
def known_schedule(source: str | None, base: DDPMScheduler) -> tuple[dict[str, Any], str]:
    """The schedule by whose timesteps the network knows noise levels before it trains, and what its layers predict.

    Args:
        source: a pipeline or checkpoint that it starts from; None, or one that does not say, stands for its base.
        base: the training schedule of the base.
    """
    levels = own = schedule_summary(base)
    folder = None if source is None else resolve_snapshot(source)
    if folder is not None and Path(folder, INDEX).is_file():
        index = load_index(folder)
        own = schedule_summary(make_scheduler(index.get("training_schedule") or load_scheduler_config(folder)))
        levels = index.get("network_schedule") or own
    elif folder is not None and is_checkpoint(folder) and (run := read_state(folder)["run"]):
        own = {key: run["fixed"][key] for key in SUMMARY if key in run["fixed"]}
        levels = (
            run["fixed"].get("network_schedule", levels) or own
        )  # older checkpoints do not say; as a rule it is the base's
    return levels, own["prediction_type"]


def warm_start(unet: nn.Module, source: str) -> list[str]:
    """Copies every weight of a saved video model, its own or borrowed, that has the same name and shape; all others stay.

    Args:
        source: a pipeline or checkpoint: an embedded model, a folder or a hub repository.

    Returns:
        The names of the weights that were not copied.

    Raises:
        UserError: there is no such model, or none of its weights fits the video UNet.
    """
    folder, saved = resolve_snapshot(source, ["unet"]), dict[str, torch.Tensor]()
    if Path(folder, INDEX).is_file():  # a checkpoint borrows none
        saved = load_source_weights(folder, load_index(folder))
    saved |= load_safetensors(Path(folder, "unet").glob("*.safetensors"), "name another model in init_weights_from")
    # AppearNet starts as a copy of the main branch, as in a network that starts from its base.
    saved = {f"appear_net.{key}": value for key, value in saved.items()} | saved
    state = unet.state_dict()
    copied = {key: value for key, value in saved.items() if key in state and state[key].shape == value.shape}
    if not copied:
        raise UserError(f"init_weights_from: '{source}' has none of the video UNet's weights; name a video model")
    unet.load_state_dict(copied, strict=False)
    return sorted(state.keys() - copied.keys())


def warm_start_summary(new_weights: Collection[str], source: str) -> str:
    """One line: how many tensors are newly initialized, by component."""
    components = Counter(key.split(".")[0] for key in new_weights)
    text = ", ".join(f"{component} ({count})" for component, count in components.items()) or "nothing"
    return f"the video UNet starts from '{source}'; newly initialized: {text}"
