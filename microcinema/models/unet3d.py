"""UNet3D: a 2D UNet's layers with temporal layers between them. VideoUNet and AppearNet are both made of it.

`temporal.convolutions` places the temporal convolutions:

- `inside`: two in every ResNet block, within its residual, after each of its convolutions, with GroupNorm over frames too
  (MicroCinema, arXiv 2311.18829, figure of the block), and one after every down- and upsampler (earlier code of its authors);
- `after`: one behind every ResNet block, with GroupNorm per frame. Ours: a third of the cost.

Shapes: b clips, f frames, c channels of a layer, h w its spatial size, d width of the time embedding.
"""

from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from microcinema.config.network import VideoUNetConfig
from microcinema.models.attention import zero_init
from microcinema.models.conditioning import Conditions, drop
from microcinema.models.temporal import FrameConv, TemporalConv, TemporalTransformer
from microcinema.models.unet2d import UNet2DBackbone, all_blocks, layer_specs, resamplers_of


class UNet3D(UNet2DBackbone):
    """Base class of the networks that see all frames of a clip."""

    new_prefixes: tuple[str, ...] = (
        *("temporal_", "fps_embedding.", "motion_score_embedding.", "keyframe_noise_embedding.", "frame_embedding."),
        "placed_conv_in.",
    )

    def _build_temporal_layers(self, options: VideoUNetConfig) -> None:
        """The temporal layers, numbered as the layers that they belong to, and the embeddings that are added to that of time."""
        temporal, groups = options.temporal, options.unet2d.get("norm_num_groups", 32)
        specs = layer_specs(self)
        if temporal.convolutions == "after":
            self.temporal_convs = nn.ModuleList(TemporalConv(spec.width, groups, False) for spec in specs)
        else:
            self.temporal_first_convs = nn.ModuleList(TemporalConv(spec.width, groups, True) for spec in specs)
            self.temporal_second_convs = nn.ModuleList(TemporalConv(spec.width, groups, True) for spec in specs)
            widths = [block.resnets[-1].out_channels for block in all_blocks(self) for _ in resamplers_of(block)]
            self.temporal_resample_convs = nn.ModuleList(FrameConv(width) for width in widths)
        text_width = (options.motion_width or options.unet2d["cross_attention_dim"]) if temporal.text else None
        self.temporal_transformers = nn.ModuleDict()
        for number, spec in enumerate(specs):
            if spec.has_attention:
                self.temporal_transformers[str(number)] = TemporalTransformer(
                    spec.width,
                    spec.width // temporal.attention_bottleneck,
                    groups,
                    options.max_frames if temporal.positions else None,
                    text_width,
                    temporal.feed_forward,
                )
        for name, enabled in (
            ("fps_embedding", options.fps_conditioning),
            ("motion_score_embedding", options.motion_score),
            ("keyframe_noise_embedding", options.keyframe_noise),
            ("frame_embedding", temporal.frame_embedding),
        ):
            if enabled:
                width = self.time_embedding.linear_1.out_features
                setattr(self, name, TimestepEmbedding(self.time_embedding.linear_1.in_features, width))
                zero_init(getattr(self, name).linear_2)
        if options.keyframe_places:
            # A separate convolution, since that of a concatenation is a sum. No bias: a dropped key frame must add nothing.
            channels = self.conv_in.in_channels + 1
            self.placed_conv_in = zero_init(nn.Conv2d(channels, self.conv_in.out_channels, 3, padding=1, bias=False))
        self.temporal = temporal

    def embed_latents(self, z_t: Tensor, conditions: Conditions) -> Tensor:
        """Features `(b f) c h w` of noisy latents `b f c h w`, and of the key frames at their places for a network that has these."""
        h = self.conv_in(rearrange(z_t, "b f c h w -> (b f) c h w"))
        if hasattr(self, "placed_conv_in") and conditions.placed is not None:
            h = h + self.placed_conv_in(rearrange(conditions.placed, "b f c h w -> (b f) c h w"))
        return h

    def embed_time_and_frames(self, z_t: Tensor, t: Tensor | float, conditions: Conditions) -> Tensor:
        """SiLU `(b f) d` of the embeddings of diffusion time, the numbers that are told, and frame index, for latents `b f c h w`."""
        b, frames = z_t.shape[:2]
        emb = self.embed_time(t, z_t, conditions.added)
        for name in ("fps", "motion_score", "keyframe_noise"):
            if hasattr(self, f"{name}_embedding") and (number := getattr(conditions, name)) is not None:
                embedded = getattr(self, f"{name}_embedding")(self.time_proj(number.expand(b)).to(emb.dtype))
                emb = emb + (embedded if name == "fps" else drop(embedded, number.expand(b) >= 0))
        emb = repeat(emb, "b d -> (b f) d", f=frames)
        if self.temporal.frame_embedding:
            # The temporal transformers have positions, but only they; this is for the ResNet blocks.
            index = self.time_proj(torch.arange(frames, device=emb.device)).to(emb.dtype)
            emb = emb + repeat(self.frame_embedding(index), "f d -> (b f) d", b=b)
        return functional.silu(emb)

    def res_block(
        self, number: int, resnet: Any, h: Tensor, emb: Tensor, frames: int, scale_shift: Tensor | None = None
    ) -> Tensor:
        """A ResNet block with its temporal convolutions; `scale_shift` is injected into the last of them."""
        if self.temporal.convolutions == "after":
            return self.temporal_convs[number](resnet(h, emb), frames, scale_shift)
        first, second = self.temporal_first_convs[number], self.temporal_second_convs[number]
        return resnet(h, emb, frames, first, second, scale_shift)

    def temporal_attention(self, number: int, h: Tensor, frames: int, conditions: Conditions) -> Tensor:
        """The temporal transformer of a layer, which reads the motion caption's tokens if there are any, else the text."""
        if conditions.motion is None:
            return self.temporal_transformers[str(number)](h, frames, conditions.text)
        return self.temporal_transformers[str(number)](h, frames, conditions.motion, conditions.motion.any(-1))

    def after_resampling(self, number: int, h: Tensor, frames: int) -> Tensor:
        """The temporal convolution behind a down- or upsampler."""
        return self.temporal_resample_convs[number](h, frames) if self.temporal.convolutions == "inside" else h
