"""How the field brings frames to the 224x224 pixels of I3D. Each way gives another Fréchet distance, so each has a name.

Every function takes uint8 (n, 3, h, w) and gives float32 (n, 3, 224, 224) in [-1, 1].
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from microcinema.evaluation.i3d import SIZE


def tf_squash(frames: Tensor) -> Tensor:
    """TensorFlow 1's `resize_bilinear`, the aspect ratio lost: google-research `frechet_video_distance`.

    Its pixels have their place at their corner: source = target * scale, where all others have (target + 1/2) * scale - 1/2.
    """
    pixels = frames.float()
    for axis in (2, 3):
        size = pixels.shape[axis]
        place = torch.arange(SIZE, device=pixels.device) * (size / SIZE)
        low = place.floor().long().clamp(max=size - 1)
        share = (place - low).to(pixels.dtype).view((-1, 1) if axis == 2 else (-1,))
        high = (low + 1).clamp(max=size - 1)
        pixels = pixels.index_select(axis, low) * (1 - share) + pixels.index_select(axis, high) * share
    return _scaled(pixels)


def squash(frames: Tensor) -> Tensor:
    """Bilinear without antialiasing, the aspect ratio lost: TATS, and cd-fvd where it is given arrays."""
    return _scaled(_bilinear(frames.float(), (SIZE, SIZE)))


def short_side_crop(frames: Tensor) -> Tensor:
    """Shorter side to 224, bilinear without antialiasing, centre crop: VideoGPT, DIGAN, PVDM, common_metrics_on_video_quality."""
    return _scaled(_centre(_short_side(frames.float(), SIZE, antialias=False), SIZE))


def cd_fvd(frames: Tensor) -> Tensor:
    """Shorter side to 256 with antialiasing, centre crop, cut off to bytes, squashed to 224: cd-fvd where it reads files."""
    pixels = _centre(_short_side(frames.float() / 255, 256, antialias=True), 256)
    return squash((pixels * 255).to(torch.uint8))


PREPARATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function for function in (tf_squash, squash, short_side_crop, cd_fvd)
}


def _scaled(pixels: Tensor) -> Tensor:
    return 2 * pixels / 255 - 1


def _bilinear(pixels: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=antialias)


def _short_side(pixels: Tensor, side: int, antialias: bool) -> Tensor:
    height, width = pixels.shape[2:]
    scale = side / min(height, width)
    size = (side, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), side)
    return _bilinear(pixels, size, antialias)


def _centre(pixels: Tensor, side: int) -> Tensor:
    top, left = ((size - side) // 2 for size in pixels.shape[2:])
    return pixels[:, :, top : top + side, left : left + side]
