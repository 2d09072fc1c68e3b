"""The file of a trained LoRA, in the layout of diffusers, with a model card."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from microcinema.config.compose import shareable, to_yaml
from microcinema.config.schema import Train
from microcinema.utils.files import atomic_path
from microcinema.utils.hashing import hash_file
from microcinema.utils.provenance import describe_code
from microcinema.utils.templates import write_page

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
CARD = "README.md"
TEMPLATE = Path(__file__).with_name("templates") / "lora_card.md.jinja"


def save_lora(weights: Mapping[str, torch.Tensor], config: Train, folder: Path, name: str, step: int) -> None:
    """Writes a LoRA and its card into a folder; at scale 1 it is what was trained, since `alpha / rank` becomes part of B.

    Args:
        weights: by the names of `TrainableModel`, `unet.(layer).lora_{A,B}.default.weight`; others are left out.
        name: of the folder, in the card.
        step: of the run that has these weights.
    """
    assert config.lora is not None
    gain = config.lora.alpha / config.lora.rank
    state = {
        key.replace(".default.", "."): (value * gain if ".lora_B." in key else value).contiguous()
        for key, value in weights.items()
        if ".lora_" in key
    }
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(state, temporary, {"format": "pt"})
    settings, digest = shareable(config), hash_file(folder / WEIGHTS)
    write_page(
        folder / CARD,
        TEMPLATE,
        name=name,
        config=settings,
        config_yaml=to_yaml(settings).strip(),
        step=step,
        layers=sum(".lora_A." in key for key in state),
        parameters=sum(value.numel() for value in state.values()),
        weights=WEIGHTS,
        sha256=digest,
        versions=describe_code(),
    )
