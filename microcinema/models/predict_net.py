"""PredictNet: optical flow from the video UNet's decoder features, an auxiliary task of training (arXiv 2408.10119)."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from microcinema.models.layers import zero_init


class PredictNet(ModelMixin, ConfigMixin):
    """Forward optical flow between neighbouring frames, read from the decoder's last features. Starts at zero flow.

    Used in training only: what it teaches stays in the VideoUNet, and a saved pipeline does not carry it.

    Args:
        channels: of the decoder's features.
        width: inner channels.
    """

    @register_to_config
    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            zero_init(nn.Conv2d(width, 2, 3, padding=1)),
        )

    def forward(self, features: Tensor, frames: int) -> Tensor:
        """Flow `b f-1 2 h w` (dx, dy), in places of the latent grid from each frame to the next, of features `(b f) c h w`."""
        clips = rearrange(features, "(b f) c h w -> b f c h w", f=frames)
        pairs = torch.cat([clips[:, :-1], clips[:, 1:]], dim=2)
        flow = self.network(rearrange(pairs, "b f c h w -> (b f) c h w"))
        return rearrange(flow, "(b f) c h w -> b f c h w", b=len(clips))
