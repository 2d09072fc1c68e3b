"""PredictNet: optical flow from the video UNet's decoder features, an auxiliary task in training.

Factorized-Dreamer (arXiv 2408.10119) supervises optical flow by a PredictNet; its structure is not published, this one is ours.

Shapes: b clips, f frames, c channels, h w latent grid.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from microcinema.models.attention import zero_init
from microcinema.models.video_unet import VideoUNet

# Output scale, the typical flow magnitude. Between neighboring frames most things move by tenths of a latent position, and an Adam step
# of learning rate 1e-3 may move an output of 576 inputs by more than that. With this scale the error on frozen features was 0.68 of
# predicting zero flow after 400 steps, without it 0.82.
_SCALE = 0.1


class PredictNet(ModelMixin, ConfigMixin):
    """Forward optical flow between neighboring frames, predicted from the decoder's last features; starts at zero flow.

    It is used in training only; a saved pipeline does not contain it. Its input is each frame's features and their change to the
    next frame, after a norm as in the UNet's output layer: features of a residual decoder grow without bound, and neighboring
    frames share most of them. `channels` are those of the features, `width` the inner ones.
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
    def for_unet(cls, unet: VideoUNet) -> "PredictNet":
        """A new PredictNet for the decoder's last features of a UNet."""
        return cls(unet.conv_norm_out.num_channels, unet.conv_norm_out.num_groups)

    def forward(self, features: Tensor, frames: int) -> Tensor:
        """Flow `b f-1 2 h w` (dx, dy) from each frame to the next, in latent positions, of features `(b f) c h w`."""
        clips = rearrange(self.norm(features), "(b f) c h w -> b f c h w", f=frames)
        pairs = torch.cat([clips[:, :-1], clips.diff(dim=1)], dim=2)
        flow = _SCALE * self.network(rearrange(pairs, "b f c h w -> (b f) c h w"))
        return rearrange(flow, "(b f) c h w -> b f c h w", b=len(clips))
