"""Pixel-aware cross-attention: every frame looks at pixel-level features of the key frame.

Factorized-Dreamer (arXiv 2408.10119) names pixel-aware cross-attention; the block is from PASD (arXiv 2308.14469). Where its features
come from is not published: the convolutional pyramid over the key frame's pixels is our choice, and so is attention alone, at
some scales (PASD has whole transformer blocks in every decoder layer, see docs/method.md).

Shapes: b clips, f frames, c channels of a layer, h w its spatial size, H W pixels of the key frame.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from einops import rearrange
from torch import Tensor, nn

from microcinema.models.attention import KeyValue, attention, count_heads, zero_init
from microcinema.utils.errors import UserError


class PixelAwareCrossAttention(nn.Module):
    """Residual attention of every frame to the key frame at the same scale: `h + W_out attention(W_q norm(h), K, V)`.

    `W_out` is zero-initialized.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.heads = count_heads(channels)
        self.norm = nn.GroupNorm(groups, channels)
        self.to_query = nn.Conv2d(channels, channels, 1, bias=False)
        # No bias: the values of a dropped key frame are zero and must add nothing.
        self.to_out = zero_init(nn.Conv2d(channels, channels, 1, bias=False))

    def forward(self, h: Tensor, pixels: KeyValue) -> Tensor:
        """Maps `(b f) c h w` to the same shape; `pixels` are keys and values `b (h w) c` of the PixelPyramid."""
        frames, height = len(h) // len(pixels.key), h.shape[-2]
        query = rearrange(self.to_query(self.norm(h)), "(b f) c h w -> b (f h w) c", f=frames)
        out = attention(query, pixels, self.heads)
        return h + self.to_out(rearrange(out, "b (f h w) c -> (b f) c h w", f=frames, h=height))


class PixelPyramid(nn.Module):
    """A small convolutional pyramid over the key frame's pixels, with keys and values for every pixel-aware layer.

    Each stage halves the size: `log2(downsampling)` stages down to the latent grid, and one more for each coarser scale.

    Args:
        downsampling: scale factor of the VAE: pixels per latent position.
        scales: of the layers, in rising order: latent positions per position of the layer, 1, 2, 4 ...
        layers: scale and channels of each pixel-aware layer, in the order of the layers.
        width: channels at the latent grid; half of it before, twice as many at each scale after, at most four times.

    Raises:
        UserError: scales that are not rising powers of two.
    """

    def __init__(self, downsampling: int, scales: Sequence[int], layers: Sequence[tuple[int, int]], width: int = 64):
        super().__init__()
        if sorted(set(scales)) != list(scales) or not all(s > 0 and math.log2(s).is_integer() for s in scales):
            raise UserError(f"pixel scales {list(scales)} are not rising powers of two; use for example [2, 4]")
        stages = round(math.log2(downsampling)) + round(math.log2(scales[-1]))
        self.first_scale = 1 / downsampling
        widths = [width // 2, *(self._width(width, 2 ** (k + 1) / downsampling) for k in range(stages))]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(a, b, 3, stride=2, padding=1),
                nn.SiLU(),
                nn.Conv2d(b, b, 3, padding=1),
                nn.GroupNorm(math.gcd(8, b), b),
            )
            for a, b in pairwise(widths)
        )
        self.scales = [scale for scale, _ in layers]
        self.to_kv = nn.ModuleList(nn.Conv2d(self._width(width, s), 2 * c, 1, bias=False) for s, c in layers)

    @staticmethod
    def _width(width: int, scale: float) -> int:
        return width // 2 if scale < 1 else width * min(4, round(scale))

    def forward(self, pixels: Tensor) -> tuple[KeyValue, ...]:
        """Keys and values `b (h w) c` of every pixel-aware layer, for key frames `b 3 H W` in [-1, 1]."""
        h, scale = self.conv_in(pixels), self.first_scale
        features = {}
        for stage in self.stages:
            h, scale = stage(h), 2 * scale
            features[scale] = h
        pairs = (
            rearrange(to_kv(features[scale]), "b (kv c) h w -> kv b (h w) c", kv=2)
            for scale, to_kv in zip(self.scales, self.to_kv, strict=True)
        )
        return tuple(KeyValue(key, value) for key, value in pairs)
