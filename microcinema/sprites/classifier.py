"""SpriteClassifier: the small video network that names what a Moving Sprites clip shows.

It judges generated clips (shape, colour, background) and its penultimate features carry the Fréchet distance of the Moving
Sprites protocol: the stand-in for I3D and C3D in the embedded world, never compared with them.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from microcinema.utils.errors import UserError


class TemporalConv(nn.Module):
    """Residual convolution over three neighbouring frames at each pixel, as one 1x1 convolution; `stride` 2 keeps every second frame."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.norm = nn.GroupNorm(8, channels)
        self.conv = nn.Conv2d(3 * channels, channels, 1)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(b f) c h w -> (b f/stride) c h w"""
        h = rearrange(functional.silu(self.norm(x)), "(b f) c h w -> b f c h w", f=frames)
        before = torch.cat([h[:, :1], h[:, :-1]], dim=1)
        after = torch.cat([h[:, 1:], h[:, -1:]], dim=1)
        h = torch.cat([before, h, after], dim=2)[:, :: self.stride]
        skip = rearrange(x, "(b f) c h w -> b f c h w", f=frames)[:, :: self.stride]
        return skip.flatten(0, 1) + self.conv(h.flatten(0, 1))


class SpatialConv(nn.Module):
    """Norm, SiLU and a 3x3 convolution; residual where the shape allows it, halving height and width where `stride` is 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels
        self.norm = nn.GroupNorm(8, in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """n c h w -> n c' h/stride w/stride"""
        h = self.conv(functional.silu(self.norm(x)))
        return x + h if self.residual else h


class SpriteClassifier(ModelMixin, ConfigMixin):
    """Factorised space/time convolutions, a spatial soft-argmax that follows the sprite, one linear head per attribute.

    Args:
        classes: attribute -> names of its classes in the order of the logits.
        num_frames: divisible by 4.
        channels: at a half, a quarter and an eighth of the resolution, each divisible by 8.
        feature_dim: width of the penultimate features.

    Raises:
        UserError: a number of frames or widths that do not divide.
    """

    @register_to_config
    def __init__(
        self,
        classes: dict[str, list[str]],
        num_frames: int = 16,
        channels: tuple[int, int, int] = (16, 48, 96),
        feature_dim: int = 128,
    ) -> None:
        super().__init__()
        if num_frames % 4 or num_frames < 4:
            raise UserError(f"num_frames is {num_frames}; the classifier needs a positive multiple of 4")
        if any(width % 8 for width in channels):
            raise UserError(f"channels are {tuple(channels)}; the classifier needs multiples of 8")
        low, middle, high = channels
        self.stem = nn.Conv2d(3, low, 5, stride=2, padding=2)
        self.down1 = SpatialConv(low, middle, stride=2)
        self.time1 = TemporalConv(middle, stride=2)
        self.space1 = SpatialConv(middle, middle)
        self.down2 = SpatialConv(middle, high, stride=2)
        self.time2 = TemporalConv(high, stride=2)
        self.space2 = SpatialConv(high, high)
        self.time3 = TemporalConv(high)
        self.space3 = SpatialConv(high, high)
        self.norm = nn.GroupNorm(8, high)
        self.saliency = nn.Conv2d(high, 1, 1)
        self.penultimate = nn.Linear((num_frames // 4) * (2 * high + 2), feature_dim)
        self.heads = nn.ModuleDict({name: nn.Linear(feature_dim, len(names)) for name, names in classes.items()})

    def features(self, video: Tensor) -> Tensor:
        """Penultimate features, (b f 3 h w) in [-1, 1] -> (b feature_dim); a UserError for a clip with another number of frames than the
        network was built for."""
        frames = video.shape[1]
        if frames != self.config.num_frames:
            raise UserError(f"the clip has {frames} frames; this classifier reads {self.config.num_frames}")
        x = self.down1(self.stem(rearrange(video, "b f c h w -> (b f) c h w")))
        x = self.space1(self.time1(x, frames))
        x = self.time2(self.down2(x), frames // 2)
        x = self.space3(self.time3(self.space2(x), frames // 4))
        x = functional.silu(self.norm(x))

        # Spatial soft-argmax: the features under the sprite and where the sprite is, at each of f/4 times.
        rows, columns = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
        weight = self.saliency(x).flatten(1).softmax(dim=1)
        pixels = rearrange(x, "n c h w -> n (h w) c")
        position = weight @ torch.cartesian_prod(rows, columns).flip(1)  # x, y
        under = torch.einsum("np,npc->nc", weight, pixels)
        pooled = torch.cat([under, pixels.mean(dim=1), position], dim=1)
        return functional.silu(self.penultimate(rearrange(pooled, "(b f) d -> b (f d)", f=frames // 4)))

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """(b f 3 h w) in [-1, 1] -> attribute -> logits (b classes)."""
        features = self.features(video)
        return {name: head(features) for name, head in self.heads.items()}
