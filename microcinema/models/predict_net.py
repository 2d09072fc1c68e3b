"""PredictNet: optical flow from the video UNet's decoder features, an auxiliary task of training (arXiv 2408.10119)."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from microcinema.models.temporal import zero_init
from microcinema.models.video_unet import VideoUNet

# Between neighbouring frames most things move by tenths of a latent place, and an Adam step of learning rate 1e-3 may move an output of 576 inputs
# by more than that. With what the network says scaled to what there is to say, the error on frozen features was 0.68 of predicting zero flow
# after 400 steps, and without it 0.82.
_SCALE = 0.1


class PredictNet(ModelMixin, ConfigMixin):
    """Forward optical flow between neighbouring frames, read from the decoder's last features. Starts at zero flow.

    Used in training only: what it teaches stays in the VideoUNet, and a saved pipeline does not carry it.

    It reads each frame's features and their change to the next frame, after a norm of its own, as the UNet's output layer has one: features of a
    residual decoder grow without bound, and most of what two neighbouring frames say is the same.

    Args:
        channels: of the decoder's features.
        norm_num_groups: groups of the norm.
        width: inner channels.
    """

    @register_to_config
    def __init__(self, channels: int, norm_num_groups: int, width: int = 64):
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels)
        self.network = nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            zero_init(nn.Conv2d(width, 2, 3, padding=1)),
        )

    @classmethod
    def reading(cls, unet: VideoUNet) -> "PredictNet":
        """A new one for the decoder's last features of this UNet."""
        return cls(unet.config["block_out_channels"][0], unet.config["norm_num_groups"])

    def forward(self, features: Tensor, frames: int) -> Tensor:
        """Flow `b f-1 2 h w` (dx, dy), in places of the latent grid from each frame to the next, of features `(b f) c h w`."""
        clips = rearrange(self.norm(features), "(b f) c h w -> b f c h w", f=frames)
        pairs = torch.cat([clips[:, :-1], clips.diff(dim=1)], dim=2)
        flow = _SCALE * self.network(rearrange(pairs, "b f c h w -> (b f) c h w"))
        return rearrange(flow, "(b f) c h w -> b f c h w", b=len(clips))
