"""Pictures as a viewer shows them, in 8-bit sRGB: for key frames and for training alike."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from microcinema.utils.errors import UserError, first_line, user_errors

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""No other decoder of Pillow is tried, whatever a file is called; that of EPS would start Ghostscript."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 2**27
BACKGROUND = "white"
_BIT_DEPTHS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # Pillow leaves PNG's transparent color in the file's depth


def open_image(path: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture file, by its path or as an object with `read`, as `to_rgb` makes it; of several frames, the first one. A UserError if it is
    no regular file of one of the `FORMATS`, damaged, above `max_pixels`, or nothing for `to_rgb`."""
    try:
        is_path = isinstance(path, str | os.PathLike)
        if is_path and not Path(path).is_file():
            raise ValueError("not a regular file" if os.path.lexists(path) else "no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on its lower limit of pixels and on tags that are not needed
            with Image.open(path if is_path else io.BytesIO(path.read()), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise ValueError(f"it has {image.width}x{image.height} pixels, above the limit of {max_pixels}")
                color = image.info.get("transparency")
                if image.format == "PNG" and (factor := _BIT_DEPTHS.get(str(image.tile[0][3]))) and color is not None:
                    values = np.multiply(color, factor).astype(int)
                    image.info["transparency"] = int(values) if values.ndim == 0 else tuple(values.tolist())
                return to_rgb(image)
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        kinds = f"not an image of the kinds {', '.join(FORMATS)}"
        reason = kinds if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UserError(f"image '{path}' cannot be read ({reason}); replace it, or take it off the list") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in mode RGB: turned as its EXIF data says, its colors in sRGB, over a white background.

    `info["conversions"]` of the result says which of `bit_depth`, `alpha` and `color_profile` were changed, and how. A UserError for numbers
    without a known range (32 bits, TIFF other than 8 or 16 bits), or an unusable color profile.
    """
    tags, conversions = getattr(image, "tag_v2", {}), dict(image.info.get("conversions", {}))
    has_16_bits = image.mode.startswith("I;16") and (tags.get(258, (16,)), tags.get(262, 1)) == ((16,), 1)
    image, alpha = ImageOps.exif_transpose(image), None
    profile, transparent = (image.info.get(key) for key in ("icc_profile", "transparency"))
    if has_16_bits:
        values, conversions["bit_depth"] = np.asarray(image), "16 to 8"
        alpha = None if transparent is None else Image.fromarray(np.uint8(255) * (values != transparent))
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.mode[0] in "IF" or image.mode == "LAB":
        raise UserError(f"pixels of the kind {image.mode} have no known range; save it with 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image, alpha = image.convert("RGB"), image.getchannel("A")
    if profile:
        image, conversions["color_profile"] = _to_srgb(image, profile)
    image = image.convert("RGB")
    if alpha and alpha.getextrema() != (255, 255):
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), alpha)
        conversions["alpha"] = f"composited over {BACKGROUND}"
    image.info = {"conversions": conversions}
    return image


def _to_srgb(image: Image.Image, data: bytes) -> tuple[Image.Image, str]:
    with user_errors("its color profile cannot be used: {reason}; save it as sRGB"):
        profile = ImageCms.getOpenProfile(io.BytesIO(data))
        modes = {} if image.mode == "CMYK" else {"RGB": "RGB", "GRAY": "L"}
        source = image.convert(modes.get(profile.profile.xcolor_space.strip(), image.mode))
        if source.convert("RGB").tobytes() != image.convert("RGB").tobytes():
            raise ValueError("it is for gray images")
        srgb = ImageCms.createProfile("sRGB")
        converted: Any = ImageCms.profileToProfile(source, profile, srgb, outputMode="RGB")
    return converted, f"{profile.profile.profile_description or 'unnamed'} to sRGB"
