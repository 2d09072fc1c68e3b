"""A video UNet initialized from a video model trained earlier, by `init_weights_from`: for a further stage, or with other components."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from microcinema.pipelines.loading import INDEX, load_index, resolve_snapshot
from microcinema.pipelines.saving import load_source_weights
from microcinema.training.checkpoint import load_safetensors
from microcinema.utils.errors import UserError


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
