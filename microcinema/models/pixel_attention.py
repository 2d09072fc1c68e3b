"""Pixel-aware cross-attention: every frame looks at pixel-level features of the key frame.

Factorized-Dreamer (arXiv 2408.10119) names pixel-aware cross-attention; the block is from PASD (arXiv 2308.14469), by the same first
author: a whole transformer block in every layer of the decoder, at all scales. Where its features come from is not published: the
convolutional pyramid over the key frame's pixels is our choice. Attention alone, behind the spatial transformers, is a cheaper one.

Shapes: b clips, f frames, c channels of a layer, h w its spatial size, e channels of a feature, H W pixels of the key frame.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import rearrange
from torch import Tensor, nn

from microcinema.models.attention import KeyValue, attention, count_heads, zero_init
from microcinema.models.unet2d import share_tokens, spatial_transformer
from microcinema.utils.errors import UserError


class PixelAwareTransformer(nn.Module):
    """PASD's block (arXiv 2308.14469): self-attention, cross-attention to the key frame, feed-forward; residual.

    The output projection is zero-initialized.
    """

    def __init__(self, channels: int, groups: int, feature_width: int):
        super().__init__()
        heads = count_heads(channels)
        self.transformer = Transformer2DModel(
            heads, channels // heads, channels, norm_num_groups=groups, cross_attention_dim=feature_width
        )
        share_tokens(self.transformer)
        zero_init(self.transformer.proj_out)

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """Maps `(b f) c h w` to the same shape; `features` are the PixelPyramid's `b (h w) e`."""
        return spatial_transformer(self.transformer, h, features)


class PixelAwareCrossAttention(nn.Module):
    """Residual attention of every frame to the key frame at the same scale: `h + W_out attention(W_q norm(h), K, V)`. Ours.

    `W_out` is zero-initialized.
    """

    def __init__(self, channels: int, groups: int, feature_width: int):
        super().__init__()
        self.heads = count_heads(channels)
        self.norm = nn.GroupNorm(groups, channels)
        self.to_query = nn.Conv2d(channels, channels, 1, bias=False)
        # No bias here: the values of a dropped key frame are zero and must add nothing.
        self.to_kv = nn.Linear(feature_width, 2 * channels, bias=False)
        self.to_out = zero_init(nn.Conv2d(channels, channels, 1, bias=False))

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """Maps `(b f) c h w` to the same shape; `features` are the PixelPyramid's `b (h w) e`."""
        frames, height = len(h) // len(features), h.shape[-2]
        query = rearrange(self.to_query(self.norm(h)), "(b f) c h w -> b (f h w) c", f=frames)
        out = attention(query, KeyValue(*self.to_kv(features).chunk(2, dim=-1)), self.heads)
        return h + self.to_out(rearrange(out, "b (f h w) c -> (b f) c h w", f=frames, h=height))


class PixelPyramid(nn.Module):
    """A small convolutional pyramid over the key frame's pixels.

    Each stage halves the size: `log2(downsampling)` stages down to the latent grid, and one more for each coarser scale.

    Args:
        downsampling: scale factor of the VAE: pixels per latent position.
        scales: in rising order, latent positions per position of the layers: 1, 2, 4 ...
        width: channels at the latent grid; half of it before, twice as many at each scale after, at most four times.

    Raises:
        UserError: scales that are not rising powers of two.
    """

    def __init__(self, downsampling: int, scales: Sequence[int], width: int = 64):
        super().__init__()
        if sorted(set(scales)) != list(scales) or not all(s > 0 and math.log2(s).is_integer() for s in scales):
            raise UserError(f"pixels.scales {list(scales)} are not rising powers of two; use for example [2, 4]")
        stages = round(math.log2(downsampling)) + round(math.log2(scales[-1]))
        self.first_scale, self.scales, self.base_width = 1 / downsampling, tuple(scales), width
        widths = [width // 2, *(self.width(2 ** (k + 1) / downsampling) for k in range(stages))]
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

    def width(self, scale: float) -> int:
        """Channels of the features at a scale."""
        return self.base_width // 2 if scale < 1 else self.base_width * min(4, round(scale))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Features `b (h w) e` of every scale, for key frames `b 3 H W` in [-1, 1]."""
        h, scale = self.conv_in(pixels), self.first_scale
        features = []
        for stage in self.stages:
            h, scale = stage(h), 2 * scale
            if scale in self.scales:
                features.append(rearrange(h, "b e h w -> b (h w) e"))
        return tuple(features)
