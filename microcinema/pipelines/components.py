"""The components of a video pipeline: those that it was not given are loaded from where its config says."""

from typing import Any

import torch

from microcinema.models.vae import overflows
from microcinema.pipelines.base_model import BASE_COMPONENTS, SECOND_ENCODER, base_components, check_compatible
from microcinema.pipelines.encoders import (
    IMAGE_ENCODER,
    MOTION_ENCODER,
    MOTION_TOKENIZER,
    load_image_encoder,
    load_motion_encoder,
)
from microcinema.pipelines.loading import load_components, resolve_snapshot
from microcinema.utils.errors import UserError

OPTIONAL_COMPONENTS = (*BASE_COMPONENTS, *SECOND_ENCODER, IMAGE_ENCODER, MOTION_ENCODER, MOTION_TOKENIZER)
COMPONENTS = (*OPTIONAL_COMPONENTS, "unet", "scheduler")


def load_missing_components(components: dict[str, Any], config: dict[str, Any]) -> None:
    """Loads components that are None and that the UNet uses, and sets to None those that it does not use. A UserError for a component without
    a source, or components that do not fit together."""
    dtype, options = components["unet"].dtype, components["unet"].options
    origin = config["base"], config["base_revision"], config["base_variant"]
    if any(components[name] is None for name in BASE_COMPONENTS):
        if config["base"] is None:
            raise UserError("the video pipeline has no vae and text encoder, and no base to take them from; name one")
        classes, own = base_components(resolve_snapshot(config["base"], (), *origin[1:-1]))
        folder = resolve_snapshot(config["base"], classes, *origin[1:])
        components |= load_components(folder, classes, config["base_variant"], dtype, source=config["base"])
        config |= own
    check_compatible("the video pipeline", components, options.unet2d)
    vae = components["vae"]
    if components["text_encoder_2"] is None:  # only SDXL's VAE overflows, but true is diffusers' default for any
        vae.register_to_config(force_upcast=False)
    elif overflows(vae, vae.dtype):
        for weight in vae.parameters():  # `float` would not change tensors without data
            weight.data = weight.data.float()
    if options.adapter is None:
        components[IMAGE_ENCODER] = None
    elif components[IMAGE_ENCODER] is None:
        if config["image_encoder_source"] is None and config["base"] is None:
            raise UserError("the adapter has no image encoder, and no base to take it from; give one of the two")
        loaded = load_image_encoder(config["image_encoder_source"], str(origin[0]), *origin[1:], dtype)
        components[IMAGE_ENCODER] = loaded.pop(IMAGE_ENCODER)
        config |= {key: loaded[key] for key in ("image_mean", "image_std")}
    if options.motion_width is None:
        components |= {MOTION_ENCODER: None, MOTION_TOKENIZER: None}
    elif components[MOTION_ENCODER] is None:
        if config["motion_encoder_source"] is None:
            raise UserError("the model uses motion captions, and has no motion encoder; give motion_encoder_source")
        loaded = load_motion_encoder(config["motion_encoder_source"], dtype)
        components |= {name: loaded[name] for name in (MOTION_ENCODER, MOTION_TOKENIZER)}


def freeze_encoders(pipeline: Any, device: torch.device) -> None:
    """Freezes all networks of a video pipeline but the UNet, and moves them to a device, for training."""
    for name, network in pipeline.components.items():
        if name != "unet" and isinstance(network, torch.nn.Module):
            network.requires_grad_(False).eval().to(device)
