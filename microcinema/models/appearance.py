"""The appearance branch: a network that sees the key frame, and the injection of its features into VideoUNet.

AppearNet is MicroCinema's (arXiv 2311.18829, figures of the architecture and of the block). ReferenceNet, ours, reads the clean key
frame alone and runs once per clip.

Shapes: b clips, f frames, c channels of a layer, h w its spatial size, n text tokens, d text width.
"""

from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from microcinema.config.network import Appearance, VideoUNetConfig
from microcinema.models.attention import zero_init
from microcinema.models.conditioning import Conditions
from microcinema.models.unet2d import (
    ENCODER_MODULES,
    LayerSpec,
    StepCache,
    UNet2DBackbone,
    layer_specs,
    spatial_transformer,
)
from microcinema.models.unet3d import UNet3D


class AppearanceEmbedding(NamedTuple):
    """AppearNet's embeddings of one layer, `(b f) c h w`."""

    resnet: Tensor  # of its ResNet block
    attention: Tensor | None  # of its attention block, spatial and temporal; None where it has none


def embedding_sources(net: UNet2DBackbone, inject: str) -> dict[int, tuple[int, ...]]:
    """For each layer of `net` with injection, the layers of AppearNet whose embeddings it gets.

    Drawn: an encoder layer gets that of the same layer, the mid block's goes to the last layer of the encoder and the first of the
    decoder, and nothing to the mid block. Ours: a decoder layer gets that of the layer whose skip connection it reads; where that is no
    layer's (`conv_in`, a downsampler), that of the nearest layer of the same resolution.
    """
    skips: list[int] = []  # the layer that stands for each skip connection
    number = 0
    for block in net.down_blocks:
        skips.append(number)
        for _ in block.resnets:
            skips.append(number)
            number += 1
    mid = number + len(net.mid_block.resnets) - 1
    sources: dict[int, tuple[int, ...]] = {}
    if inject != "decoder":
        sources |= {layer: (layer, mid) if layer == number - 1 else (layer,) for layer in range(number)}
    if inject != "encoder":
        sources |= {mid + 1 + i: (skip,) if i else (skip, mid) for i, skip in enumerate(reversed(skips))}
    return sources


class Injection(nn.Module):
    """Projections of appearance embeddings for one layer of VideoUNet, zero-initialized at their ends.

    As the authors draw it: gamma and beta, `(b f) 2c h w`, scale and shift the last temporal layer of the ResNet block
    (`TemporalConv`), and a second projection is added after the attention block. That the first projector is a 1x1 convolution and SiLU is
    ours.

    Args:
        channels: of the layer.
        fusion: `scale_shift`, `add` or `both`.
        has_attention: whether the layer, and the embedding, have an attention block.
    """

    def __init__(self, channels: int, fusion: str, has_attention: bool):
        super().__init__()
        if fusion != "add":
            self.projector = nn.Conv2d(channels, channels, 1)
            self.to_scale_shift = zero_init(nn.Conv2d(channels, 2 * channels, 1))
        if fusion != "scale_shift" and has_attention:
            self.to_sum = zero_init(nn.Conv2d(channels, channels, 1))

    def scale_shift(self, embedding: Tensor) -> Tensor | None:
        """gamma and beta of a ResNet block's embedding `(b f) c h w`."""
        if not hasattr(self, "projector"):
            return None
        return self.to_scale_shift(functional.silu(self.projector(embedding)))

    def add(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        """`h` plus the projection of an attention block's embedding."""
        return h + self.to_sum(embedding) if hasattr(self, "to_sum") and embedding is not None else h


def make_injections(
    specs: list[LayerSpec], sources: dict[int, tuple[int, ...]], appearance: Appearance
) -> nn.ModuleDict:
    """An Injection for each layer with sources, by its number; `specs` are those of all layers of VideoUNet."""
    injections = nn.ModuleDict()
    for layer, layers in sources.items():
        has_attention = specs[layer].has_attention and any(specs[source].has_attention for source in layers)
        injections[str(layer)] = Injection(specs[layer].width, appearance.fusion, has_attention)
    return injections


def combine(embeddings: list[AppearanceEmbedding], sources: tuple[int, ...]) -> AppearanceEmbedding:
    """The sum of the sources' embeddings."""
    first, *others = (embeddings[source] for source in sources)
    resnet, attention = first
    for other in others:
        resnet = resnet + other.resnet
        if other.attention is not None:
            attention = other.attention if attention is None else attention + other.attention
    return AppearanceEmbedding(resnet, attention)


class AppearNet(UNet3D):
    """MicroCinema's AppearNet: encoder and mid block of the video UNet, which run at every step on `z_t + zero_conv(z_c)`.

    z_c are the key frame's latents, the same for every frame. It sees text and time as the main branch does, and starts as a copy of
    its encoder and mid block.
    """

    new_prefixes = (*UNet3D.new_prefixes, "keyframe_conv.")

    def __init__(self, options: VideoUNetConfig):
        super().__init__()
        self._build_unet2d(options.unet2d, ENCODER_MODULES)
        self._build_temporal_layers(options)
        channels = self.conv_in.in_channels
        # No bias: a dropped key frame is zero and must add nothing.
        self.keyframe_conv = zero_init(nn.Conv2d(channels, channels, 1, bias=False))

    def forward(
        self, z_t: Tensor, t: Tensor | float, conditions: Conditions, cache: StepCache | None = None
    ) -> list[AppearanceEmbedding]:
        """The embeddings of every layer, for latents `b f c h w`; those of the first resolution if the cache holds the deep features."""
        frames, emb = z_t.shape[1], self.embed_time_and_frames(z_t, t, conditions)

        def layer(number: int, resnet: nn.Module, transformer: Any, h: Tensor) -> tuple[Tensor, AppearanceEmbedding]:
            h = resnet_output = self.res_block(number, resnet, h, emb, frames)
            if transformer is not None:
                h = spatial_transformer(transformer, h, conditions.text)
                h = self.temporal_attention(number, h, frames, conditions)
            return h, AppearanceEmbedding(resnet_output, h if transformer is not None else None)

        if conditions.keyframe is not None:
            z_t = z_t + self.keyframe_conv(conditions.keyframe)[:, None]
        h = self.embed_latents(z_t, conditions)
        return self.run_blocks(h, layer, lambda number, x: self.after_resampling(number, x, frames), cache)[1]


def fuse(h: Tensor, feature: Tensor, fusion: str, groups: int) -> Tensor:
    """Injects ReferenceNet's feature of a clip into each of its frames; a zero feature leaves `h` unchanged, exactly.

        add:          h + feature                    feature b c h w
        scale_shift:  h + beta + norm(h) * gamma     gamma, beta = feature b 2c h w

    `h` is `(b f) c h w`; the norm has no weights and is per frame. `scale_shift` is spatially-adaptive denormalization
    (arXiv 1903.07291, equation 1) as a residual, so that it starts as the identity.
    """
    frames = rearrange(h, "(b f) c h w -> b f c h w", b=feature.shape[0])
    if fusion == "add":
        fused = frames + feature[:, None]
    else:
        gamma, beta = feature[:, None].chunk(2, dim=2)
        norm = rearrange(functional.group_norm(h, groups), "(b f) c h w -> b f c h w", b=feature.shape[0])
        fused = (frames + beta).addcmul_(norm, gamma)  # two passes over memory instead of three
    return rearrange(fused, "b f c h w -> (b f) c h w")


class ReferenceNet(UNet2DBackbone):
    """A copy of the 2D UNet that maps a clean key frame and its text to one feature per injected layer. Ours.

    Its diffusion time is 0. Zero-initialized projections let `fuse` start as the identity. Layers that no feature needs are not built.
    """

    new_prefixes = ("projections.",)

    def __init__(self, options: VideoUNetConfig):
        super().__init__()
        assert options.appearance is not None
        inject, self.fusion = options.appearance.inject, options.appearance.fusion
        factor = 2 if self.fusion == "scale_shift" else 1
        self._build_unet2d(options.unet2d, ENCODER_MODULES if inject == "encoder" else (*ENCODER_MODULES, "up_blocks"))
        widths = [spec.width for spec in layer_specs(self)]
        encoder = sum(len(block.resnets) for block in (*self.down_blocks, self.mid_block))  # the down and mid layers
        self.injected = range(encoder if inject == "decoder" else 0, encoder if inject == "encoder" else len(widths))
        self.projections = nn.ModuleList(zero_init(nn.Conv2d(widths[i], factor * widths[i], 1)) for i in self.injected)

    def forward(self, z_ref: Tensor, text: Tensor, added: Tensor | None = None) -> tuple[Tensor, ...]:
        """Features `b c h w` (add) or `b 2c h w` (scale_shift) for every injected layer, of latents `b c h w` and text `b n d`.

        `added`, `b e`, is of `split_text`.
        """
        emb = functional.silu(self.embed_time(0, z_ref, added))

        def layer(number: int, resnet: nn.Module, transformer: Any, h: Tensor) -> tuple[Tensor, Tensor]:
            h = resnet(h, emb)
            h = h if transformer is None else spatial_transformer(transformer, h, text)
            return h, h

        features = self.run_blocks(self.conv_in(z_ref), layer)[1]
        return tuple(projection(features[i]) for projection, i in zip(self.projections, self.injected, strict=True))
