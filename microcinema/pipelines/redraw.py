"""Stage 1 draws a part of a key frame anew: inpainting by diffusers, with the networks of any text-to-image pipeline for which it has that."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers import AutoPipelineForInpainting
from PIL import Image, ImageFilter

from microcinema.config.sampling import ResizeMode
from microcinema.data.images import open_image
from microcinema.pipelines.keyframe import Keyframe, KeyframePipeline, as_pil, make_keyframe
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.text_to_video import draw_keyframes
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.hashing import hash_array


def inpainting_pipeline(source: KeyframePipeline) -> KeyframePipeline:
    """The one of the same networks that draws a part of a picture; a UserError if diffusers has none for this class."""
    fault = f"stage 1, {type(source.source).__name__}, cannot draw a part of a picture ({{reason}})"
    with user_errors(f"{fault}; leave out mask, or name another keyframe.pretrained_model_name_or_path", ValueError):
        pipeline = AutoPipelineForInpainting.from_pipe(source.source)
    unet = getattr(pipeline, "unet", None)
    if unet is not None and unet.config["in_channels"] == pipeline.vae.config["latent_channels"]:
        # It reads this number only to tell a network that sees no mask, so that it blends latents; the embedded ones have 16.
        unet.register_to_config(in_channels=4)
    return KeyframePipeline(pipeline, "stretch", source.origin)


def inpainting_arguments(
    source: KeyframePipeline, height: int, width: int, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of stage 1, for inpainting: the masked part begins as noise; a size that is left open is of the video's shape, with as many
    pixels as the pipeline draws otherwise."""
    arguments = {**arguments, **({"strength": 1.0} if source.takes("strength") else {})}
    if arguments["draw_height"] is None:
        pipeline = source.source
        own = getattr(pipeline, "default_sample_size", None) or pipeline.unet.config["sample_size"]
        scale = int(np.max(own)) * pipeline.vae_scale_factor / math.sqrt(height * width)
        sides = [16 * max(1, round(scale * side / 16)) for side in (height, width)]
        arguments |= dict(zip(("draw_height", "draw_width"), sides, strict=True))
    return arguments


def open_masked(item: PromptItem, height: int, width: int, resize_mode: ResizeMode) -> tuple[Keyframe, Keyframe]:
    """The image of an item and its mask at the video's size; a UserError if one cannot be read, or their own sizes differ."""
    image = as_pil(item.image) if isinstance(item.image, np.ndarray) else open_image(item.image)
    mask = open_image(item.mask)
    if image.size != mask.size:
        sizes = f"mask '{item.mask}' has {mask.width}x{mask.height} pixels, its image {image.width}x{image.height}"
        raise UserError(f"{sizes}; give one of the image's size, white where it is drawn anew")
    origin = "array" if isinstance(item.image, np.ndarray) else str(item.image)
    keyframe = make_keyframe(image, height, width, {"source": origin}, resize_mode)
    return keyframe, make_keyframe(mask, height, width, {"source": str(item.mask)}, resize_mode)


def redraw(source: KeyframePipeline, item: PromptItem, image: Keyframe, mask: Keyframe, **arguments: Any) -> Keyframe:
    """A key frame drawn anew, of an item's prompt and generator, where its mask is white, and exactly as it was where that is black.

    Args:
        source: an `inpainting_pipeline`.
        image, mask: of one size; between black and white they are blended.
        arguments: `inpainting_arguments`.
    """
    alpha, size = mask.image.convert("L"), (arguments["draw_width"], arguments["draw_height"])
    # The pipeline reads one pixel of the mask for each latent position: all of those that the mask touches are drawn.
    touched = alpha.resize(size).filter(ImageFilter.MaxFilter(2 * source.source.vae_scale_factor - 1))
    source.inputs |= {"image": image.image, "mask_image": touched}
    (drawn,) = draw_keyframes([item], source, image.image.height, image.image.width, **arguments)
    pixels = Image.composite(drawn.image, image.image, alpha)
    resized = {key: image.provenance[key] for key in ("original_size", "resize_mode", "scaled", "cropped")}
    hashes = {"sha256_of_pixels": hash_array(np.asarray(pixels))}
    return Keyframe(pixels, {**drawn.provenance, **resized, **redrawn(image, mask), **hashes})


def redrawn(image: Keyframe, mask: Keyframe) -> dict[str, Any]:
    """The entry of a record that says of which picture a key frame is, and what of it was drawn anew."""
    return {"redrawn": {"image": image.provenance, "mask": mask.provenance}}
