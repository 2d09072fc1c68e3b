"""PixelPyramid: pixel-level features of the key frame at the scales of the video UNet, for pixel-aware cross-attention."""

import math
from collections.abc import Sequence
from itertools import pairwise

from einops import rearrange
from torch import Tensor, nn

from microcinema.models.temporal import KeyValue
from microcinema.utils.errors import UserError


class PixelPyramid(nn.Module):
    """A small convolutional pyramid over the key frame's pixels; keys and values for every layer that looks at them.

    Each stage halves the size. Down to the latent grid, `log2(downsampling)` stages, and from there one a scale.

    Args:
        downsampling: of the VAE: pixels per place of the latent grid.
        scales: sizes that layers work at, as places of the latent grid per place of the layer: 1, 2, 4 ...; in rising order.
        layers: for each layer that looks, its scale and its channels, in the order of the layers.
        width: channels at the latent grid; half of it before that, twice at each scale after it, at most four times.
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
        self.to_kv = nn.ModuleList(
            nn.Conv2d(self._width(width, scale), 2 * channels, 1, bias=False) for scale, channels in layers
        )

    @staticmethod
    def _width(width: int, scale: float) -> int:
        return width // 2 if scale < 1 else width * min(4, round(scale))

    def forward(self, pixels: Tensor) -> tuple[KeyValue, ...]:
        """Keys and values of every layer that looks.

        Args:
            pixels: key frames `b 3 H W` in [-1, 1].
        """
        h, scale = self.conv_in(pixels), self.first_scale
        at = {}
        for stage in self.stages:
            h, scale = stage(h), 2 * scale
            at[scale] = h
        found = []
        for scale, to in zip(self.scales, self.to_kv, strict=True):
            key, value = rearrange(to(at[scale]), "b (kv c) h w -> kv b (h w) c", kv=2)
            found.append(KeyValue(key, value))
        return tuple(found)
