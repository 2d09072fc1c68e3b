"""Networks that begin with the weights of a video model that was trained before: for a further stage, or with other parts."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from microcinema.pipelines.loading import INDEX, load_index, resolve_snapshot
from microcinema.pipelines.saving import load_source_weights
from microcinema.utils.errors import UserError


def warm_start(networks: Mapping[str, nn.Module], source: str) -> dict[str, list[str]]:
    """Copies every weight that a saved video model has, its own or borrowed, by the same name and shape; all others stay as they are.

    Args:
        networks: `unet` and `condition_encoder`.
        source: a pipeline or checkpoint: an embedded model, a folder or a hub repository.

    Returns:
        By network, the names of those that stay as they were.

    Raises:
        UserError: there is no such model, or none of its weights is the network's.
    """
    folder, new = resolve_snapshot(source, list(networks)), {}
    for name, network in networks.items():
        found: dict[str, torch.Tensor] = {}
        if name == "unet" and Path(folder, INDEX).is_file():  # a checkpoint has none
            found = load_source_weights(folder, load_index(folder))
        for file in sorted((Path(folder) / name).glob("*.safetensors")):
            try:
                found |= load_file(file)
            except (OSError, SafetensorError) as error:
                raise UserError(f"init_weights_from: '{file}' cannot be read ({error}); name another model") from None
        own = network.state_dict()
        fitting = {key: value for key, value in found.items() if key in own and own[key].shape == value.shape}
        if name == "unet" and not fitting:
            raise UserError(
                f"init_weights_from: '{source}' has none of the video UNet's weights; name a model that this project trained"
            )
        network.load_state_dict(fitting, strict=False)
        new[name] = sorted(own.keys() - fitting.keys())
    return new


def describe(new: Mapping[str, list[str]], source: str) -> str:
    """A line for each network: how many tensors begin anew, and of which parts."""
    lines = []
    for name, keys in new.items():
        parts = Counter(key.split(".")[0] for key in keys)
        said = ", ".join(f"{part} ({count})" for part, count in parts.items()) or "nothing"
        lines.append(f"{name} starts from '{source}'; anew: {said}")
    return "\n".join(lines)
