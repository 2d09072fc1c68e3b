"""Layers that VideoUNet adds to the 2D UNet. All end in a zero-initialised projection: at initialisation each is exactly the identity."""

import math
from typing import NamedTuple, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def zero_init(module: ModuleT) -> ModuleT:
    """Sets all parameters of `module` to zero and returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoids(length: int, width: int) -> Tensor:
    """Sinusoidal positions `length width` (arXiv 1706.03762, section 3.5): half the channels sines, then cosines."""
    half = (width + 1) // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def count_heads(width: int) -> int:
    """The most attention heads that divide `width` and are at least 32 wide."""
    return max(n for n in range(1, max(1, width // 32) + 1) if width % n == 0)


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, which depend on neither noise nor time.

    Attributes:
        key, value: `b m c`, all heads side by side.
        mask: bool `b m`, False where a key is padding; None: none is.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None


def attend(query: Tensor, to: KeyValue, heads: int) -> Tensor:
    """Attention of `query` `b n c` to keys and values of the same b clips; returns `b n c`."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (query, to.key, to.value))
    mask = None if to.mask is None else rearrange(to.mask, "b m -> b 1 1 m")
    return rearrange(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)")


class TemporalConv(nn.Module):
    """Convolution over frames: `h_i + W_-1 x_{i-1} + W_0 x_i + W_1 x_{i+1}`, `x = silu(norm(h))`, zero beyond the ends.

    One 1x1 convolution computes the three products of every frame; adding them one frame apart is then a sum over
    views, so that the frames never move in memory. The convolution is zero-initialised.

    Args:
        channels: channels of `h`.
        groups: groups of the norm.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.taps = zero_init(nn.Conv2d(channels, 3 * channels, 1, bias=False))

    def forward(self, h: Tensor, frames: int) -> Tensor:
        """Maps `(b f) c h w` to the same shape; `frames` is f."""
        taps = rearrange(self.taps(functional.silu(self.norm(h))), "(b f) c h w -> b f c h w", f=frames)
        to_next, to_self, to_previous = taps.chunk(3, dim=2)
        out = rearrange(h, "(b f) c h w -> b f c h w", f=frames) + to_self
        out[:, 1:] += to_next[:, :-1]
        out[:, :-1] += to_previous[:, 1:]
        return rearrange(out, "b f c h w -> (b f) c h w")


class TemporalTransformer(nn.Module):
    """Transformer over frames: every pixel's frames are one sequence.

    `h + W_out y` with `x = W_in norm(h)`, `x' = x + attention(norm(x) + position)`, `y = x' + feed_forward(norm(x'))`;
    the feed-forward is gated (GEGLU, arXiv 2002.05202). `W_in` narrows to `width` channels, where the layer costs
    little and where the sequences of the pixels are laid out; `W_out` is zero-initialised. Positions are a table that
    is learned from a sinusoidal start. With motion attention `x'` also attends to the tokens of the motion caption
    (arXiv 2408.10119), whose keys and values are given: they are the same for all pixels, frames and steps.

    Args:
        channels: channels of `h`.
        width: inner channels.
        groups: groups of the norm.
        max_frames: length of the position table.
        motion_attention: attend to the motion caption as well.
    """

    def __init__(self, channels: int, width: int, groups: int, max_frames: int, motion_attention: bool = False):
        super().__init__()
        self.heads = count_heads(width)
        self.norm = nn.GroupNorm(groups, channels)
        self.proj_in = nn.Conv2d(channels, width, 1)
        self.positions = nn.Parameter(sinusoids(max_frames, width))
        self.attention_norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        if motion_attention:
            self.motion_norm = nn.LayerNorm(width)
            self.to_motion_query = nn.Linear(width, width, bias=False)
            self.to_motion_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, 4 * width)
        self.feed_forward_out = nn.Linear(2 * width, width)
        self.proj_out = zero_init(nn.Conv2d(width, channels, 1))

    def forward(self, h: Tensor, frames: int, motion: KeyValue | None = None) -> Tensor:
        """Maps `(b f) c h w` to the same shape; `frames` is f, `motion` the motion caption's keys and values."""
        height, width = h.shape[-2:]
        x = rearrange(self.proj_in(self.norm(h)), "(b f) c h w -> (b h w) f c", f=frames)
        x = x + self._attention(self.attention_norm(x) + self.positions[:frames])
        if motion is not None:
            # Every pixel and frame of a clip is one more query of the same keys.
            query = rearrange(self.to_motion_query(self.motion_norm(x)), "(b p) f c -> b (p f) c", b=len(motion.key))
            x = x + rearrange(self.to_motion_out(attend(query, motion, self.heads)), "b (p f) c -> (b p) f c", f=frames)
        value, gate = self.feed_forward_in(self.feed_forward_norm(x)).chunk(2, dim=-1)
        x = x + self.feed_forward_out(value * functional.gelu(gate))
        x = rearrange(x, "(b h w) f c -> (b f) h w c", h=height, w=width)
        return h + self.proj_out(rearrange(x, "n h w c -> n c h w"))

    def _attention(self, x: Tensor) -> Tensor:
        query, key, value = rearrange(self.to_qkv(x), "n f (k h d) -> k n h f d", k=3, h=self.heads)
        out = functional.scaled_dot_product_attention(query, key, value)
        return self.to_out(rearrange(out, "n h f d -> n f (h d)"))


class PixelAwareCrossAttention(nn.Module):
    """Every pixel of every frame looks at the key frame's pixels at the same scale: `h + W_out attention(W_q norm(h), K, V)`.

    The block of arXiv 2308.14469, which Factorized-Dreamer (arXiv 2408.10119) takes up. Keys and values come from
    a pyramid over the key frame's pixels (models/pixels.py); `W_out` is zero-initialised.

    Args:
        channels: channels of `h`, of the keys and of the values.
        groups: groups of the norm.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.heads = count_heads(channels)
        self.norm = nn.GroupNorm(groups, channels)
        self.to_query = nn.Conv2d(channels, channels, 1, bias=False)
        # No bias: the values of a dropped key frame are zero and must add nothing.
        self.to_out = zero_init(nn.Conv2d(channels, channels, 1, bias=False))

    def forward(self, h: Tensor, pixels: KeyValue) -> Tensor:
        """Maps `(b f) c h w` to the same shape."""
        frames, height = len(h) // len(pixels.key), h.shape[-2]
        query = rearrange(self.to_query(self.norm(h)), "(b f) c h w -> b (f h w) c", f=frames)
        out = attend(query, pixels, self.heads)
        return h + self.to_out(rearrange(out, "b (f h w) c -> (b f) c h w", f=frames, h=height))
