"""Temporal layers of VideoUNet. Each ends in a zero-initialized projection, so that it starts as exactly the identity.

This is our design: light layers after each ResNet block and each spatial transformer. MicroCinema's authors draw theirs inside the
ResNet blocks and at full width (see docs/method.md).

Shapes: b clips, f frames, c channels, h w spatial size, d inner width, m tokens of the motion caption.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from microcinema.models.attention import KeyValue, attention, count_heads, zero_init


def sinusoids(length: int, width: int) -> Tensor:
    """Sinusoidal positions `length width` (arXiv 1706.03762, section 3.5): sines in the first half of the channels, then cosines."""
    half = (width + 1) // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


class TemporalConv(nn.Module):
    """Residual convolution over frames: `h_i + W_-1 x_{i-1} + W_0 x_i + W_1 x_{i+1}`, `x = silu(norm(h))`, zero-padded.

    One 1x1 convolution computes the three products of every frame; shifting them is then a sum over views, without copies.
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
    """Residual transformer over frames: the f frames at each position are one sequence.

        x = W_in norm(h);  x += attention(norm(x) + position);  x += feed_forward(norm(x));  h + W_out x

    The feed-forward is gated (GEGLU, arXiv 2002.05202). `W_in` narrows to `width` channels; `W_out` is zero-initialized. Positions
    are learned from a sinusoidal start. With motion attention, x also attends to the tokens of the motion caption, whose keys and
    values are the same for all positions, frames and steps: Factorized-Dreamer (arXiv 2408.10119) reads the motion caption
    with T5; that the temporal layers attend to it is our choice.

    Args:
        channels, width: of `h`; inner channels d.
        max_frames: length of the position table.
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
        """Maps `(b f) c h w` to the same shape; `frames` is f, `motion` the keys and values `b m d` of the motion caption."""
        height, width = h.shape[-2:]
        x = rearrange(self.proj_in(self.norm(h)), "(b f) c h w -> (b h w) f c", f=frames)
        query, key, value = self.to_qkv(self.attention_norm(x) + self.positions[:frames]).chunk(3, dim=-1)
        x = x + self.to_out(attention(query, KeyValue(key, value), self.heads))
        if motion is not None:
            # All positions and frames of a clip are queries of the same keys.
            query = rearrange(self.to_motion_query(self.motion_norm(x)), "(b p) f c -> b (p f) c", b=len(motion.key))
            out = self.to_motion_out(attention(query, motion, self.heads))
            x = x + rearrange(out, "b (p f) c -> (b p) f c", f=frames)
        value, gate = self.feed_forward_in(self.feed_forward_norm(x)).chunk(2, dim=-1)
        x = x + self.feed_forward_out(value * functional.gelu(gate))
        x = rearrange(x, "(b h w) f c -> (b f) h w c", h=height, w=width)
        return h + self.proj_out(rearrange(x, "n h w c -> n c h w"))
