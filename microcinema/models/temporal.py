"""Temporal layers. Each ends in a zero-initialized projection, so that it starts as exactly the identity.

Their places in the network are those of MicroCinema's figure and of its authors' earlier code, or cheaper ones of ours: see UNet3D.

Shapes: b clips, f frames, c channels, h w spatial size, d inner width, m tokens of a caption, e their width.
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


class FrameTaps(nn.Conv2d):
    """The weights of a FrameConv, `3c c 1 1`, as a 1x1 convolution whose outputs go to the next, the same and the previous frame."""

    def forward(self, x: Tensor, over_frames: bool = False) -> Tensor:
        """Maps `n c h w` to `n 3c h w`; `over_frames`: `b c f p` to the sums `b c f p`, by one convolution over three frames."""
        if not over_frames:
            return super().forward(x)
        kernel = rearrange(self.weight, "(k c) d 1 1 -> c d k 1", k=3)
        return functional.conv2d(x, kernel, padding=(1, 0))


class FrameConv(nn.Module):
    """Residual convolution over three frames: `h_i + W_-1 x_{i-1} + W_0 x_i + W_1 x_{i+1}`, zero-padded and zero-initialized."""

    def __init__(self, channels: int):
        super().__init__()
        self.taps = zero_init(FrameTaps(channels, 3 * channels, 1, bias=False))

    def forward(self, h: Tensor, frames: int, x: Tensor | None = None) -> Tensor:
        """Maps `h`, `(b f) c h w`, to the same shape; `frames` is f, and x is h if it is None."""
        x, height = h if x is None else x, h.shape[-2]
        h = rearrange(h, "(b f) c h w -> b c f (h w)", f=frames)
        if isinstance(self.taps, FrameTaps):
            h = h + self.taps(rearrange(x, "(b f) c h w -> b c f (h w)", f=frames), over_frames=True)
        else:  # LoRA has wrapped it, or its weights have eight bits
            taps = rearrange(self.taps(x), "(b f) (k c) h w -> k b c f (h w)", f=frames, k=3)
            h = h + functional.pad(taps[0], (0, 0, 1, -1)) + taps[1] + functional.pad(taps[2], (0, 0, -1, 1))
        return rearrange(h, "b c f (h w) -> (b f) c h w", h=height)


class TemporalConv(FrameConv):
    """The FrameConv of `x = silu(norm(h))`: the temporal layer of MicroCinema's ResNet block (arXiv 2311.18829, figure of the block).

    Args:
        over_frames: the statistics of the GroupNorm are those of a clip, over its channels of a group, frames, height and width, as
            the authors draw it; False: those of each frame.
    """

    def __init__(self, channels: int, groups: int, over_frames: bool):
        super().__init__(channels)
        self.norm = nn.GroupNorm(groups, channels)
        self.over_frames = over_frames

    def forward(self, h: Tensor, frames: int, scale_shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Maps `(b f) c h w` to the same shape.

        Args:
            frames: f.
            scale_shift: gamma and beta `(b f) 2c h w` of the injection, `norm(h) gamma + beta + norm(h)`; None: none.
        """
        if self.over_frames:
            x = self.norm(rearrange(h, "(b f) c h w -> b c f h w", f=frames))
            x = rearrange(x, "b c f h w -> (b f) c h w")
        else:
            x = self.norm(h)
        if scale_shift is not None:
            gamma, beta = scale_shift.chunk(2, dim=1)
            x = x + torch.addcmul(beta, x, gamma)
        return super().forward(h, frames, functional.silu(x))


class TemporalTransformer(nn.Module):
    """Residual transformer over frames: the f frames at each position are one sequence.

        x = W_in norm(h);  x += attention(norm(x) + position);  x += attention(norm(x), text);  x += feed_forward(norm(x));  h + W_out x

    The feed-forward is gated (GEGLU, arXiv 2002.05202). `W_in` narrows to `width` channels; `W_out` is zero-initialized. That it reads
    the text, at full width, is as in the earlier code of MicroCinema's first author; the positions, learned from a sinusoidal
    start, are ours. Factorized-Dreamer (arXiv 2408.10119) reads a motion caption with T5; that its tokens come here is our choice.

    Args:
        channels, width: of `h`; inner channels d.
        max_frames: length of the table of positions; None: no positions.
        text_width: width e of the text tokens; None: it reads no text.
        feed_forward: inner channels of the feed-forward, as a multiple of `width`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        groups: int,
        max_frames: int | None,
        text_width: int | None,
        feed_forward: int,
    ):
        super().__init__()
        self.heads = count_heads(width)
        self.norm = nn.GroupNorm(groups, channels)
        self.proj_in = nn.Conv2d(channels, width, 1)
        self.positions = None if max_frames is None else nn.Parameter(sinusoids(max_frames, width))
        self.attention_norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.reads_text = text_width is not None
        if text_width is not None:
            self.text_norm = nn.LayerNorm(width)
            self.to_text_query = nn.Linear(width, width, bias=False)
            self.to_text_kv = nn.Linear(text_width, 2 * width, bias=False)
            self.to_text_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, 2 * feed_forward * width)
        self.feed_forward_out = nn.Linear(feed_forward * width, width)
        self.proj_out = zero_init(nn.Conv2d(width, channels, 1))

    def forward(self, h: Tensor, frames: int, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Maps `(b f) c h w` to the same shape.

        Args:
            frames: f.
            text: tokens `b m e`; None: they are skipped.
            mask: bool `b m`, False where a token is padding.
        """
        height, width = h.shape[-2:]
        x = rearrange(self.proj_in(self.norm(h)), "(b f) c h w -> (b h w) f c", f=frames)
        normed = self.attention_norm(x)
        if self.positions is not None:
            normed = normed + self.positions[:frames]
        query, key, value = self.to_qkv(normed).chunk(3, dim=-1)
        x = x + self.to_out(attention(query, KeyValue(key, value), self.heads))
        if self.reads_text and text is not None:
            # All positions and frames of a clip are queries of the same keys.
            query = rearrange(self.to_text_query(self.text_norm(x)), "(b p) f c -> b (p f) c", b=len(text))
            key, value = self.to_text_kv(text).chunk(2, dim=-1)
            out = attention(query, KeyValue(key, value, mask), self.heads)
            x = x + rearrange(self.to_text_out(out), "b (p f) c -> (b p) f c", f=frames)
        value, gate = self.feed_forward_in(self.feed_forward_norm(x)).chunk(2, dim=-1)
        x = x + self.feed_forward_out(value * functional.gelu(gate))
        x = rearrange(x, "(b h w) f c -> (b f) h w c", h=height, w=width)
        return h + self.proj_out(rearrange(x, "n h w c -> n c h w"))
