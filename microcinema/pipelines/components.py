"""The components of a video pipeline: those that it was not given are loaded from where its config says."""

from typing import Any

from microcinema.pipelines.base_model import BASE_COMPONENTS, check_compatible
from microcinema.pipelines.encoders import (
    IMAGE_ENCODER,
    MOTION_ENCODER,
    MOTION_TOKENIZER,
    load_image_encoder,
    load_motion_encoder,
)
from microcinema.pipelines.loading import load_components, resolve_snapshot
from microcinema.utils.errors import UserError

OPTIONAL_COMPONENTS = (*BASE_COMPONENTS, IMAGE_ENCODER, MOTION_ENCODER, MOTION_TOKENIZER)
COMPONENTS = (*OPTIONAL_COMPONENTS, "unet", "scheduler")


def load_missing_components(components: dict[str, Any], config: dict[str, Any]) -> None:
    """Loads components that are None and that the UNet uses, and sets to None those that it does not use.

    Raises:
        UserError: a component without a source, or components that do not fit together.
    """
    dtype, options = components["unet"].dtype, components["unet"].options
    origin = config["base"], config["base_revision"], config["base_variant"]
    if any(components[name] is None for name in BASE_COMPONENTS):
        if config["base"] is None:
            raise UserError("the video pipeline has no vae and text encoder, and no base to take them from; name one")
        folder = resolve_snapshot(config["base"], BASE_COMPONENTS, *origin[1:])
        components |= load_components(folder, BASE_COMPONENTS, config["base_variant"], dtype)
    check_compatible("the video pipeline", components["vae"], components["text_encoder"], options.unet2d)
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
