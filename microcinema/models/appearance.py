"""AppearanceNet: features of the key frame for every layer of VideoUNet, and their injection.

MicroCinema (arXiv 2311.18829) has an appearance injection network; this one is our reading of its abstract, not the network of the
authors' figure. Theirs is three-dimensional, reads the noisy latents and runs at every step; ours reads the clean key frame alone and
runs once per clip. docs/method.md compares the two.

Shapes: b clips, f frames, c channels of a layer, h w its spatial size, n text tokens, d text width.
"""

from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from microcinema.models.attention import zero_init
from microcinema.models.unet2d import (
    ENCODER_MODULES,
    UNet2DBackbone,
    layer_specs,
    spatial_transformer,
    unet2d_arguments,
)
from microcinema.utils.errors import check_choice

FUSIONS = ("add", "spade")
INJECTS = ("encoder", "decoder", "both")


def injected_layers(net: UNet2DBackbone, inject: str) -> list[int]:
    """Numbers of the layers with injection: `encoder` is the down and mid layers, `decoder` the up layers."""
    encoder = sum(len(block.resnets) for block in (*net.down_blocks, net.mid_block))
    total = len(layer_specs(net))
    return list(range(encoder if inject == "decoder" else 0, encoder if inject == "encoder" else total))


def fuse(h: Tensor, feature: Tensor, fusion: str, groups: int) -> Tensor:
    """Injects the feature of a clip into each of its frames; a zero feature leaves `h` unchanged, exactly.

        add:    h + feature                    feature b c h w
        spade:  h + beta + norm(h) * gamma     gamma, beta = feature b 2c h w

    `h` is `(b f) c h w`; the norm has no weights and is per frame. `spade` is spatially-adaptive denormalization
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


class AppearanceNet(UNet2DBackbone):
    """A trainable copy of the 2D UNet that maps a clean key frame and its text to one feature per injected layer.

    Its diffusion time is 0. Zero-initialized projections let `fuse` start as the identity. Layers that no feature needs are not built.

    Args:
        unet2d: constructor arguments of the 2D UNet.
        fusion: `add` or `spade`, see `fuse`.
        inject: into which layers: `encoder`, `decoder` or `both`.

    Raises:
        UserError: an unknown fusion, inject or block type.
    """

    new_prefixes = ("projections.",)

    @register_to_config
    def __init__(self, unet2d: dict[str, Any], fusion: str = "add", inject: str = "both"):
        super().__init__()
        check_choice("fusion", fusion, FUSIONS)
        check_choice("inject", inject, INJECTS)
        self._build_unet2d(unet2d, ENCODER_MODULES if inject == "encoder" else (*ENCODER_MODULES, "up_blocks"))
        self.injected = injected_layers(self, inject)
        widths = [spec.width for spec in layer_specs(self)]
        factor = 2 if fusion == "spade" else 1
        self.projections = nn.ModuleList(zero_init(nn.Conv2d(widths[i], factor * widths[i], 1)) for i in self.injected)

    @classmethod
    def from_unet2d(cls, unet: UNet2DConditionModel, *, fusion: str = "add", inject: str = "both") -> "AppearanceNet":
        """A new AppearanceNet with the weights of a 2D UNet.

        Raises:
            UserError: the UNet is not supported, or its keys do not match.
        """
        net = cls(unet2d_arguments(dict(unet.config)), fusion, inject)
        net.load_unet2d(unet)
        return net

    def forward(self, z_ref: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """Features `b c h w` (add) or `b 2c h w` (spade) for every injected layer, of latents `b c h w` and text `b n d`."""
        emb = self.embed_time(0, z_ref.shape[0], z_ref.device)

        def layer(number: int, resnet: ResnetBlock2D, transformer: Transformer2DModel | None, h: Tensor) -> Tensor:
            h = resnet(h, emb)
            return h if transformer is None else spatial_transformer(transformer, h, text)

        features = list(self.run_blocks(self.conv_in(z_ref), layer))
        return tuple(projection(features[i]) for projection, i in zip(self.projections, self.injected, strict=True))
