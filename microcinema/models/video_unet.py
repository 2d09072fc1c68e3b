"""VideoUNet: the 2D UNet's blocks on every frame, with temporal layers and injection points between them."""

from collections import deque
from collections.abc import Sequence

import torch
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401  DiffusionPipeline.from_pretrained looks ModelMixin up here
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import rearrange, repeat
from torch import Tensor, nn

from microcinema.models.appearance import FUSIONS, INJECTS, check_choice, fuse, injected_layers
from microcinema.models.conditioning import ConditionEncoder, Conditions
from microcinema.models.temporal import PixelAwareCrossAttention, TemporalConv, TemporalTransformer, zero_init
from microcinema.models.unet2d import (
    TextImageContext,
    UNet2DBackbone,
    layer_specs,
    spatial_transformer,
    unet2d_arguments,
)
from microcinema.utils.errors import UserError


class VideoUNet(UNet2DBackbone):
    """TrainableModel of clips, `z_t, t, conditions -> prediction`, which at initialisation equals its 2D UNet on every frame.

    Every layer runs: ResNet block, temporal convolution, spatial transformer, injection of the key frame's feature,
    pixel-aware attention, temporal transformer (the transformers where the 2D UNet has one). What brings in the key frame
    stands before the temporal transformer, so that motion is computed from features that know it.

    Args:
        max_frames: longest clip (length of the learned position tables).
        temporal_bottleneck: the temporal transformers work at `channels / temporal_bottleneck`.
        keyframe_channels: channels of a key frame concatenated to the input; 0 for none. The extra input weights are
            a convolution of their own, `keyframe_conv_in`, since the convolution of a concatenation is a sum.
        fps_conditioning: add an embedding of the frame rate to the time embedding.
        frame_conditioning: add an embedding of each frame's own number to its time embedding.
        fusion: `add`, `spade` or None (no injection).
        inject: `encoder`, `decoder`, `both` or None (no injection).
        image_attention: the spatial cross-attentions read an adapter's image tokens as well, behind zero gates.
        pixel_scales: scales (places of the latent grid per place of the layer) at which layers with a transformer look at the
            key frame's pixels.
        motion_attention: the temporal transformers read the motion caption.
        the rest: as in diffusers' UNet2DConditionModel.

    Raises:
        UserError: an unknown fusion, inject or block type.
    """

    added = (
        "temporal_",
        "keyframe_conv_in.",
        "fps_embedding.",
        "frame_embedding.",
        "image_gates.",
        "pixel_attentions.",
    )

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
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
        max_frames: int = 32,
        temporal_bottleneck: int = 2,
        keyframe_channels: int = 0,
        fps_conditioning: bool = True,
        frame_conditioning: bool = True,
        fusion: str | None = None,
        inject: str | None = None,
        image_attention: bool = False,
        pixel_scales: tuple[int, ...] = (),
        motion_attention: bool = False,
    ):
        super().__init__()
        if (fusion is None) != (inject is None):
            raise UserError(f"fusion={fusion!r} and inject={inject!r} go together; give both or neither")
        if fusion is not None and inject is not None:
            check_choice("fusion", fusion, FUSIONS)
            check_choice("inject", inject, INJECTS)
        self._build(dict(self.config))
        self.injected = [] if inject is None else injected_layers(self, inject)
        shapes = layer_specs(self)
        widths = [shape.width for shape in shapes]
        self.temporal_convs = nn.ModuleList(TemporalConv(width, norm_num_groups) for width in widths)
        self.temporal_transformers = nn.ModuleDict(
            {
                str(i): TemporalTransformer(
                    widths[i], widths[i] // temporal_bottleneck, norm_num_groups, max_frames, motion_attention
                )
                for i, shape in enumerate(shapes)
                if shape.attends
            }
        )
        # As pairs: a ParameterDict sorts the keys of a dict, "10" before "2".
        self.image_gates = nn.ParameterDict(
            [(str(i), torch.zeros(shape.width)) for i, shape in enumerate(shapes) if image_attention and shape.attends]
        )
        self.pixel_attentions = nn.ModuleDict(
            {
                str(i): PixelAwareCrossAttention(shape.width, norm_num_groups)
                for i, shape in enumerate(shapes)
                if shape.attends and shape.scale in pixel_scales
            }
        )
        if keyframe_channels:
            # No bias: a dropped key frame is a zero key frame and must add nothing.
            self.keyframe_conv_in = zero_init(
                nn.Conv2d(keyframe_channels, block_out_channels[0], 3, padding=1, bias=False)
            )
        if fps_conditioning:
            self.fps_embedding = TimestepEmbedding(block_out_channels[0], self.time_embedding.linear_1.out_features)
            zero_init(self.fps_embedding.linear_2)
        if frame_conditioning:
            self.frame_embedding = TimestepEmbedding(block_out_channels[0], self.time_embedding.linear_1.out_features)
            zero_init(self.frame_embedding.linear_2)

    @classmethod
    def from_unet2d(
        cls,
        unet: UNet2DConditionModel,
        *,
        max_frames: int = 32,
        temporal_bottleneck: int = 2,
        keyframe_channels: int = 0,
        fps_conditioning: bool = True,
        frame_conditioning: bool = True,
        fusion: str | None = None,
        inject: str | None = None,
        image_attention: bool = False,
        pixel_scales: tuple[int, ...] = (),
        motion_attention: bool = False,
    ) -> "VideoUNet":
        """A VideoUNet that starts as this 2D UNet.

        Raises:
            UserError: the UNet has a feature that is not supported, or its keys do not fit; they are named.
        """
        net = cls(
            **unet2d_arguments(dict(unet.config)),
            max_frames=max_frames,
            temporal_bottleneck=temporal_bottleneck,
            keyframe_channels=keyframe_channels,
            fps_conditioning=fps_conditioning,
            frame_conditioning=frame_conditioning,
            fusion=fusion,
            inject=inject,
            image_attention=image_attention,
            pixel_scales=pixel_scales,
            motion_attention=motion_attention,
        )
        net.load_unet2d(unet)
        return net

    def added_parameters(self) -> list[nn.Parameter]:
        """The parameters that the 2D UNet does not have."""
        return [parameter for name, parameter in self.named_parameters() if name.startswith(self.added)]

    def forward(self, z_t: Tensor, t: Tensor | float, conditions: Conditions) -> Tensor:
        """Predicts the target that the model was trained for.

        Args:
            z_t: noisy latents, `b f c h w`.
            t: diffusion time, a number or `(b,)`.
            conditions: of the same b clips.

        Returns:
            The prediction, `b f c h w`.

        Raises:
            UserError: the clip's shape or the conditions do not fit the network.
        """
        h = self.head(self.features(z_t, t, conditions))
        return rearrange(h, "(b f) c h w -> b f c h w", b=len(z_t))

    def features(self, z_t: Tensor, t: Tensor | float, conditions: Conditions) -> Tensor:
        """The decoder's last features, `(b f) c h w`, for the arguments of `forward`."""
        self._check(z_t, conditions)
        b, frames = z_t.shape[:2]
        emb = self.embed_time(t, b, z_t.device)
        if self.config.fps_conditioning and conditions.fps is not None:
            emb = emb + self.fps_embedding(self.time_proj(conditions.fps.expand(b)).to(emb.dtype))
        emb = repeat(emb, "b d -> (b f) d", f=frames)
        if self.config.frame_conditioning:
            # The temporal transformers know the frame's number too, but only they; this tells every ResNet block.
            number = self.time_proj(torch.arange(frames, device=emb.device)).to(emb.dtype)
            emb = emb + repeat(self.frame_embedding(number), "f d -> (b f) d", b=b)
        appearance = dict(zip(self.injected, conditions.appearance or (), strict=False))
        image, pixels, motion = (
            dict(zip(layers, given or (), strict=False))
            for layers, given in (
                (self.image_gates, conditions.image),
                (self.pixel_attentions, conditions.pixels),
                (self.temporal_transformers, conditions.motion),
            )
        )

        def layer(number: int, resnet: ResnetBlock2D, transformer: Transformer2DModel | None, h: Tensor) -> Tensor:
            name = str(number)
            h = self.temporal_convs[number](resnet(h, emb), frames)
            if transformer is not None:
                context = (
                    TextImageContext(conditions.text, image[name], self.image_gates[name])
                    if name in image
                    else conditions.text
                )
                h = spatial_transformer(transformer, h, context)
            if number in appearance:
                h = fuse(h, appearance[number], self.config.fusion, self.config.norm_num_groups)
            if name in pixels:
                h = self.pixel_attentions[name](h, pixels[name])
            if transformer is not None:
                h = self.temporal_transformers[name](h, frames, motion.get(name))
            return h

        h = self.conv_in(rearrange(z_t, "b f c h w -> (b f) c h w"))
        if conditions.keyframe is not None:
            h = fuse(h, self.keyframe_conv_in(conditions.keyframe), "add", self.config.norm_num_groups)
        return deque(self.walk(h, layer), maxlen=1).pop()

    def head(self, features: Tensor) -> Tensor:
        """The prediction `(b f) c h w` of the decoder's last features."""
        return self.conv_out(self.conv_act(self.conv_norm_out(features)))

    def _check(self, z_t: Tensor, conditions: Conditions) -> None:
        config = self.config
        if z_t.ndim != 5 or z_t.shape[2] != config.in_channels:
            raise UserError(
                f"latents have shape {tuple(z_t.shape)}; they must be b f c h w with c={config.in_channels}"
            )
        b, frames, _, height, width = z_t.shape
        if not 1 <= frames <= config.max_frames:
            raise UserError(f"the clip has {frames} frames; this model takes 1 to {config.max_frames}")
        stride = 2 ** (len(config.block_out_channels) - 1)
        if height % stride or width % stride or not height * width:
            raise UserError(f"latents are {height}x{width}; height and width must be multiples of {stride}")
        if len(conditions.text) != b:
            raise UserError(
                f"text is for {len(conditions.text)} clips and the latents hold {b}; give one text per clip"
            )
        found = 0 if conditions.appearance is None else len(conditions.appearance)
        if found and found != len(self.injected):
            raise UserError(
                f"conditions carry {found} appearance features and the model takes {len(self.injected)} "
                f"(fusion={config.fusion}, inject={config.inject}); use the condition encoder that belongs to it"
            )
        for given, layers, part in (
            (conditions.image, self.image_gates, "image_attention"),
            (conditions.pixels, self.pixel_attentions, "pixel_scales"),
            (conditions.motion, self.temporal_transformers if config.motion_attention else (), "motion_attention"),
        ):
            if given is not None and len(given) != len(layers):
                raise UserError(
                    f"conditions carry {len(given)} keys and values for {part} and the model takes {len(layers)}; "
                    "use the condition encoder that belongs to it"
                )
        if (0 if conditions.keyframe is None else conditions.keyframe.shape[1]) not in (0, config.keyframe_channels):
            raise UserError(
                f"conditions carry a key frame for the input; the model has keyframe_channels={config.keyframe_channels}"
            )


def set_trainable(
    unet: VideoUNet,
    condition_encoder: ConditionEncoder,
    trainable_parameters: str = "temporal",
    trainable_unet_layers: Sequence[str] = (),
) -> list[nn.Parameter]:
    """Freezes what is not to be trained and returns what is, for the optimiser.

    `temporal` freezes the 2D part of the VideoUNet, but for the layers `trainable_unet_layers`; `all` freezes nothing. The condition encoder is trained in both.

    Args:
        trainable_unet_layers: modules or parameters of the 2D part by their names, such as `up_blocks.1`; all that is inside trains.

    Raises:
        UserError: `trainable_parameters` is neither, or the 2D part has nothing of such a name.
    """
    check_choice("trainable_parameters", trainable_parameters, ("temporal", "all"))
    unet.requires_grad_(trainable_parameters == "all")
    added = {id(parameter) for parameter in unet.added_parameters()}
    frozen = {name: parameter for name, parameter in unet.named_parameters() if id(parameter) not in added}
    for layer in trainable_unet_layers:
        chosen = [parameter for name, parameter in frozen.items() if f"{name}.".startswith(f"{layer}.")]
        if not chosen:
            known = sorted({name.partition(".")[0] for name in frozen})
            raise UserError(
                f"trainable_unet_layers names '{layer}', and no 2D layer has that name; it may begin with {', '.join(known)}"
            )
        for parameter in chosen:
            parameter.requires_grad_(True)
    condition_encoder.requires_grad_(True)
    for parameter in unet.added_parameters():
        parameter.requires_grad_(True)
    return [p for net in (unet, condition_encoder) for p in net.parameters() if p.requires_grad]
