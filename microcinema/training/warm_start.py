"""Networks initialized from a video model trained earlier, by `init_weights_from`: for a further stage, or with other components."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from microcinema.pipelines.loading import INDEX, load_index, resolve_snapshot
from microcinema.pipelines.saving import load_source_weights
from microcinema.utils.errors import UserError, first_line


def warm_start(networks: Mapping[str, nn.Module], source: str) -> dict[str, list[str]]:
    """Copies every weight of a saved video model, its own or borrowed, that has the same name and shape; all others stay.

    Args:
        source: a pipeline or checkpoint: an embedded model, a folder or a hub repository.

    Returns:
        By network, the names of the weights that were not copied.

    Raises:
        UserError: there is no such model, or none of its weights fits the video UNet.
    """
    folder, new_weights = resolve_snapshot(source, list(networks)), {}
    for name, network in networks.items():
        saved: dict[str, torch.Tensor] = {}
        if name == "unet" and Path(folder, INDEX).is_file():  # a checkpoint borrows none
            saved = load_source_weights(folder, load_index(folder))
        for file in sorted((Path(folder) / name).glob("*.safetensors")):
            try:
                saved |= load_file(file)
            except (OSError, SafetensorError) as error:
                raise UserError(f"init_weights_from: '{file}' cannot be read ({first_line(error)})") from None
        state = network.state_dict()
        copied = {key: value for key, value in saved.items() if key in state and state[key].shape == value.shape}
        if name == "unet" and not copied:
            raise UserError(f"init_weights_from: '{source}' has none of the video UNet's weights; name a video model")
        network.load_state_dict(copied, strict=False)
        new_weights[name] = sorted(state.keys() - copied.keys())
    return new_weights


def warm_start_summary(new_weights: Mapping[str, list[str]], source: str) -> str:
    """One line for each network: how many tensors are newly initialized, by component."""
    lines = []
    for name, keys in new_weights.items():
        components = Counter(key.split(".")[0] for key in keys)
        text = ", ".join(f"{component} ({count})" for component, count in components.items()) or "nothing"
        lines.append(f"{name} starts from '{source}'; newly initialized: {text}")
    return "\n".join(lines)
