"""What a pipeline is called with, brought to one form."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from microcinema.utils.errors import UserError

PixelImage = Image.Image | np.ndarray
"""A PIL image or a uint8 array (h, w, 3)."""


def broadcast_to_prompts(what: str, given: Any, count: int) -> list[Any]:
    """What is given for each prompt.

    Args:
        what: its name in the plural.
        given: one for all prompts, or a sequence of one each; a text is one.
        count: number of prompts.

    Raises:
        UserError: another number of them than of prompts.
    """
    several = isinstance(given, Sequence) and not isinstance(given, str)
    values = list(given) if several else [given] * count
    if len(values) != count:
        raise UserError(f"{len(values)} {what} for {count} prompts; give one each, or one for all")
    return values


def as_pil(image: PixelImage) -> Image.Image:
    """The image for PIL.

    Raises:
        UserError: an array of another type or shape, or no image at all.
    """
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"a key frame is {kind}; give a PIL image or a uint8 array (height, width, 3)")
    return Image.fromarray(image)


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Images of one size as (b, 3, h, w) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return rearrange(pixels.float() / 127.5 - 1, "b h w c -> b c h w")
