"""Pictures as a viewer shows them, in 8-bit sRGB: for key frames and for training alike."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from microcinema.utils.errors import UserError, first_line

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""No other decoder of Pillow is tried, whatever a file is called; that of EPS would start Ghostscript."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 2**27
BACKGROUND = "white"
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # by the color space of a profile
# Pillow leaves a transparent color of PNG in the file's bit depth, by the name of which it decodes the pixels.
_TRANSPARENT: dict[str, Callable[[Any], Any]] = {
    **{"L;2": lambda value: value * 85, "L;4": lambda value: value * 17},
    "RGB;16B": lambda color: tuple(value >> 8 for value in color),
}


class Readable(Protocol):
    """A file inside another one."""

    def read(self) -> bytes:
        """Its contents."""


def open_image(path: str | os.PathLike[str] | Readable) -> Image.Image:
    """A picture file as `to_rgb` makes it; of several frames, the first one.

    Raises:
        UserError: not a regular file of one of the `FORMATS`, damaged, above `MAX_PIXELS`, or nothing for `to_rgb`.
    """
    try:
        if isinstance(path, str | os.PathLike) and not Path(path).is_file():
            raise ValueError("not a regular file" if os.path.lexists(path) else "no such file")
        source = path if isinstance(path, str | os.PathLike) else io.BytesIO(path.read())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on its lower limit of pixels and on tags that are not needed
            with Image.open(source, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"it has {image.width}x{image.height} pixels, above the limit of {MAX_PIXELS}")
                if (
                    image.format == "PNG"
                    and (fit := _TRANSPARENT.get(str(image.tile[0][3])))
                    and "transparency" in image.info
                ):
                    image.info["transparency"] = fit(image.info["transparency"])
                return to_rgb(image)
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        kinds = f"not an image of the kinds {', '.join(FORMATS)}"
        reason = kinds if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UserError(f"image '{path}' cannot be read ({reason}); replace it, or take it off the list") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in mode RGB: turned as its EXIF data says, its colors in sRGB, over a white background.

    `info["conversions"]` of the result says which of `bit_depth`, `alpha` and `color_profile` were changed, and how.

    Raises:
        UserError: numbers without a known range (32 bits, TIFF other than 8 or 16 bits), or an unusable color profile.
    """
    tags, conversions = getattr(image, "tag_v2", {}), dict(image.info.get("conversions", {}))
    has_16_bits = image.mode.startswith("I;16") and (tags.get(258, (16,)), tags.get(262, 1)) == ((16,), 1)
    image = ImageOps.exif_transpose(image)
    profile, alpha = image.info.get("icc_profile"), None
    if has_16_bits:
        values = np.asarray(image)
        if "transparency" in image.info:
            alpha = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
        conversions["bit_depth"] = "16 to 8"
    elif image.mode[0] in "IF" or image.mode == "LAB":
        raise UserError(f"pixels of the kind {image.mode} have no known range; save it with 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("RGB")
    if profile:
        image, conversions["color_profile"] = _to_srgb(image, profile)
    image = image.convert("RGB")
    if alpha and alpha.getextrema() != (255, 255):
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), alpha)
        conversions["alpha"] = f"composited over {BACKGROUND}"
    image.info = {"conversions": conversions}
    return image


def _to_srgb(image: Image.Image, data: bytes) -> tuple[Image.Image, str]:
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(data))
        mode = _MODES[profile.profile.xcolor_space.strip()]
        source = image.convert(mode)
        is_same = source.convert("RGB").tobytes() == image.convert("RGB").tobytes()
        if mode != image.mode and ("CMYK" in (mode, image.mode) or not is_same):
            raise ValueError(f"it is not for {image.mode}")
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(source, profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, KeyError, OSError, ValueError) as error:
        raise UserError(f"its color profile cannot be used: {first_line(error)}; save it as sRGB") from None
    assert converted is not None  # it is only for images that are changed in place
    return converted, f"{(profile.profile.profile_description or 'unnamed').strip()} to sRGB"
