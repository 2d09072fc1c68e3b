"""AppearanceNet: features of the key frame for every layer of VideoUNet, and their injection.

MicroCinema (arXiv 2311.18829) has an appearance injection network; this one is our reading of its abstract, not the network of the
authors' figure. Theirs is three-dimensional, reads the noisy latents and runs at every step; ours reads the clean key frame alone and
runs once per clip. docs/method.md compares the two.

Shapes: b clips, f frames, c channels of a layer, h w its spatial size, n text tokens, d text width.
"""

from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from microcinema.models.attention import zero_init
from microcinema.models.unet2d import UNet2DBackbone, spatial_transformer, unet2d_arguments
from microcinema.utils.errors import check_choice

FUSIONS = ("add", "spade")
INJECTS = ("encoder", "decoder", "both")


def injected_layers(net: UNet2DBackbone, inject: str) -> list[int]:
    """Numbers of the layers with injection: `encoder` is the down and mid layers, `decoder` the up layers."""
    down, mid, up = (sum(len(net.block_layers(block)) for block in blocks) for blocks in net.blocks())
    encoder = range(down + mid)
    decoder = range(down + mid, down + mid + up)
    return [*(encoder if inject != "decoder" else ()), *(decoder if inject != "encoder" else ())]


def fuse(h: Tensor, feature: Tensor, fusion: str, groups: int) -> Tensor:
    """Injects the feature of a clip into each of its frames; a zero feature leaves `h` unchanged, exactly.

        add:    h + feature
        spade:  h + beta + norm(h) * gamma,    gamma, beta = feature

    The norm has no weights and is per frame. `spade` is spatially-adaptive denormalization (arXiv 1903.07291, equation 1) as a
    residual, so that it starts as the identity.

    Args:
        h: `(b f) c h w`.
        feature: `b c h w` for add, `b 2c h w` for spade.
        fusion: `add` or `spade`.
        groups: of the norm.
    """
    frames = rearrange(h, "(b f) c h w -> b f c h w", b=feature.shape[0])
    if fusion == "add":
        fused = frames + feature[:, None]
    else:
        gamma, beta = feature[:, None].chunk(2, dim=2)
        norm = rearrange(functional.group_norm(h, groups), "(b f) c h w -> b f c h w", b=feature.shape[0])
        # Two passes over memory instead of three.
        fused = (frames + beta).addcmul_(norm, gamma)
    return rearrange(fused, "b f c h w -> (b f) c h w")


class AppearanceNet(UNet2DBackbone):
    """A trainable copy of the 2D UNet that maps a clean key frame and its text to one feature per injected layer.

    Its diffusion time is always 0. It ends in zero-initialized projections, so that `fuse` starts as the identity. Layers that no
    feature needs are not built.

    Args:
        fusion: `add` (features have the channels of the layer) or `spade` (twice as many: scale and shift).
        inject: into which layers: `encoder`, `decoder` or `both`.
        the rest: as in UNet2DConditionModel of diffusers.

    Raises:
        UserError: an unknown fusion, inject or block type.
    """

    new_prefixes = ("projections.",)
    unused_prefixes: tuple[str, ...] = ("conv_norm_out.", "conv_out.")

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 4,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        attention_head_dim: int | tuple[int, ...] = 8,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        fusion: str = "add",
        inject: str = "both",
    ):
        super().__init__()
        check_choice("fusion", fusion, FUSIONS)
        check_choice("inject", inject, INJECTS)
        modules = ["conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block"]
        if inject == "encoder":
            self.unused_prefixes = (*self.unused_prefixes, "up_blocks.")
        else:
            modules.append("up_blocks")
        self._build_unet2d(dict(self.config), modules)
        self.injected = injected_layers(self, inject)
        widths = [resnet.out_channels for resnet, _ in self.layers()]
        factor = 2 if fusion == "spade" else 1
        self.projections = nn.ModuleList(zero_init(nn.Conv2d(widths[i], factor * widths[i], 1)) for i in self.injected)

    @classmethod
    def from_unet2d(cls, unet: UNet2DConditionModel, *, fusion: str = "add", inject: str = "both") -> "AppearanceNet":
        """A new AppearanceNet with the weights of a 2D UNet.

        Raises:
            UserError: the UNet is not supported, or its keys do not match.
        """
        arguments = unet2d_arguments(dict(unet.config))
        arguments.pop("out_channels", None)
        net = cls(**arguments, fusion=fusion, inject=inject)
        net.load_unet2d(unet)
        return net

    def forward(self, z_ref: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """Features of key frames.

        Args:
            z_ref: clean latents, `b c h w`.
            text: text tokens, `b n d`.

        Returns:
            `b c h w` (add) or `b 2c h w` (spade) for every injected layer, in order.
        """
        emb = self.embed_time(0, z_ref.shape[0], z_ref.device)

        def layer(number: int, resnet: ResnetBlock2D, transformer: Transformer2DModel | None, h: Tensor) -> Tensor:
            h = resnet(h, emb)
            return h if transformer is None else spatial_transformer(transformer, h, text)

        features = list(self.run_blocks(self.conv_in(z_ref), layer))
        return tuple(projection(features[i]) for projection, i in zip(self.projections, self.injected, strict=True))
