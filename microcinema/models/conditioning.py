"""Conditions: the inputs of the denoiser apart from noisy latents and time, computed once per clip by `VideoUNet.encode`.

Shapes: b clips, f frames, n text tokens, d text width, k motion tokens, e their width, c h w latents of a key frame or a feature.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from microcinema.models.attention import KeyValue


@dataclass
class Conditions:
    """Conditions of b clips. A part that the model does not have is None; zero stands for a dropped key frame."""

    text: Tensor  # text tokens, b n d
    keyframe: Tensor | None = None  # latents of the key frame, b c h w
    placed: Tensor | None = None  # key frames at their places, b f c+1 h w (data/keyframe_places.py)
    reference: tuple[Tensor, ...] | None = None  # ReferenceNet's feature b c h w for every injected layer
    fps: Tensor | None = None  # frames per second, (b,)
    motion_score: Tensor | None = None  # see data/motion_score.py, (b,), negative where it is dropped
    keyframe_noise: Tensor | None = None  # level of the noise on the key frame, percent of a latent's deviation, (b,)
    image: tuple[KeyValue, ...] | None = None  # of the adapter's image tokens, for every spatial cross-attention
    pixels: tuple[Tensor, ...] | None = None  # features b (h w) c of the key frame's pixels, for every scale
    motion: Tensor | None = None  # tokens of the motion caption, b k e, zero where they are padding
    added: Tensor | None = None  # SDXL: pooled text and sizes, which are added to the time embedding, b e

    def last(self, clips: int) -> "Conditions":
        """Those of the last clips."""
        return Conditions(**tree_map_only(Tensor, lambda x: x[-clips:], vars(self)))


def drop(value: Any, mask: Tensor) -> Any:
    """A tensor, or tuple of tensors, of b clips, with zeros for the clips where `mask`, bool `(b,)`, is False."""

    def kept(x: Tensor) -> Tensor:
        # where, not a product: a dropped image leaves nothing, not even a NaN, and no gradient.
        return torch.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, torch.zeros_like(x))

    return tree_map_only(Tensor, kept, value)
