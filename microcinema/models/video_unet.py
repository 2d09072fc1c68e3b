"""VideoUNet: the denoiser. The blocks of a 2D UNet on every frame, with temporal layers and conditioning between them.

Growing it from a pretrained 2D UNet is MicroCinema's (arXiv 2311.18829) and Factorized-Dreamer's (arXiv 2408.10119); the design of its
layers is our reading, see docs/method.md and the modules of the layers.

Shapes: b clips, f frames, c channels, h w spatial size, n text tokens, d text width.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401  DiffusionPipeline.from_pretrained looks ModelMixin up here
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import rearrange, repeat
from torch import Tensor, nn

from microcinema.models.appearance import FUSIONS, INJECTS, fuse, injected_layers
from microcinema.models.attention import zero_init
from microcinema.models.conditioning import ConditionEncoder, Conditions
from microcinema.models.pixel_attention import PixelAwareCrossAttention
from microcinema.models.temporal import TemporalConv, TemporalTransformer
from microcinema.models.unet2d import (
    LayerSpec,
    TextImageContext,
    UNet2DBackbone,
    layer_specs,
    spatial_transformer,
    unet2d_arguments,
)
from microcinema.utils.errors import UserError, check_choice


class VideoUNet(UNet2DBackbone):
    """Denoiser of clips, `z_t, t, conditions -> prediction`. At initialization it equals its 2D UNet on every frame.

    A layer is: ResNet block, temporal convolution, spatial transformer, injection of the key frame's feature,
    pixel-aware attention, temporal transformer (the transformers where the 2D UNet has one). The key frame enters before
    the temporal transformer, so that motion is computed from features that contain it.

    Args:
        max_frames: longest clip (length of the position tables).
        temporal_bottleneck: the temporal transformers have `channels / temporal_bottleneck` channels.
        keyframe_channels: channels of a key frame concatenated to the input; 0: none. Its input weights are a separate
            convolution, `keyframe_conv_in`, since the convolution of a concatenation is a sum.
        fps_conditioning, frame_conditioning: add embeddings of the frame rate, of the frame's index to the time embedding.
        fusion, inject: how and where the AppearanceNet's features enter, see there; both None: no injection.
        image_attention: the spatial cross-attentions also read an adapter's image tokens, through zero-initialized gates.
        pixel_scales: latent positions per position of the layers with pixel-aware attention.
        motion_attention: the temporal transformers attend to the motion caption.
        the rest: as in UNet2DConditionModel of diffusers.

    Raises:
        UserError: an unknown fusion, inject or block type.
    """

    new_prefixes = (
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
        self._build_unet2d(dict(self.config))
        self.injected = [] if inject is None else injected_layers(self, inject)
        self._build_video_layers(layer_specs(self))
        if keyframe_channels:
            conv_in = nn.Conv2d(keyframe_channels, block_out_channels[0], 3, padding=1, bias=False)
            self.keyframe_conv_in = zero_init(conv_in)  # no bias: a dropped key frame is zero and must add nothing
        for name, enabled in (("fps_embedding", fps_conditioning), ("frame_embedding", frame_conditioning)):
            if enabled:
                embedding = TimestepEmbedding(block_out_channels[0], self.time_embedding.linear_1.out_features)
                zero_init(embedding.linear_2)
                setattr(self, name, embedding)

    def _build_video_layers(self, specs: Sequence[LayerSpec]) -> None:
        """The modules between the layers of the 2D UNet; except for the convolutions, by the layer's number."""
        config = self.config
        groups = config.norm_num_groups
        attention = {str(i): spec for i, spec in enumerate(specs) if spec.has_attention}
        self.temporal_convs = nn.ModuleList(TemporalConv(spec.width, groups) for spec in specs)
        self.temporal_transformers = nn.ModuleDict()
        for i, (width, _, _) in attention.items():
            self.temporal_transformers[i] = TemporalTransformer(
                width, width // config.temporal_bottleneck, groups, config.max_frames, config.motion_attention
            )
        # As pairs: a ParameterDict sorts the keys of a dict, "10" before "2".
        gates = [(i, torch.zeros(spec.width)) for i, spec in attention.items() if config.image_attention]
        self.image_gates = nn.ParameterDict(gates)
        pixel_layers = {i: spec for i, spec in attention.items() if spec.scale in config.pixel_scales}
        self.pixel_attentions = nn.ModuleDict(
            {i: PixelAwareCrossAttention(spec.width, groups) for i, spec in pixel_layers.items()}
        )

    @classmethod
    def from_unet2d(cls, unet: UNet2DConditionModel, **options: Any) -> "VideoUNet":
        """A VideoUNet that starts as a 2D UNet; the options are arguments of the class.

        Raises:
            UserError: the UNet is not supported, or its keys do not match.
        """
        net = cls(**(unet2d_arguments(dict(unet.config)) | options))
        net.load_unet2d(unet)
        return net

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters that the 2D UNet does not have."""
        return [parameter for name, parameter in self.named_parameters() if name.startswith(self.new_prefixes)]

    def forward(self, z_t: Tensor, t: Tensor | float, conditions: Conditions) -> Tensor:
        """The prediction `b f c h w`, of the target that the model was trained for.

        Args:
            z_t: noisy latents, `b f c h w`.
            t: diffusion time, a number or `(b,)`.

        Raises:
            UserError: the latents or the conditions do not fit the network.
        """
        h = self.head(self.features(z_t, t, conditions))
        return rearrange(h, "(b f) c h w -> b f c h w", b=len(z_t))

    def features(self, z_t: Tensor, t: Tensor | float, conditions: Conditions) -> Tensor:
        """The decoder's last features, `(b f) c h w`, for the arguments of `forward`."""
        self._check_inputs(z_t, conditions)
        frames = z_t.shape[1]
        emb = self._embed_time_and_frames(z_t, t, conditions.fps)
        appearance = dict(zip(self.injected, conditions.appearance or (), strict=False))
        image = dict(zip(self.image_gates, conditions.image or (), strict=False))
        pixels = dict(zip(self.pixel_attentions, conditions.pixels or (), strict=False))
        motion = dict(zip(self.temporal_transformers, conditions.motion or (), strict=False))

        def layer(number: int, resnet: ResnetBlock2D, transformer: Transformer2DModel | None, h: Tensor) -> Tensor:
            name = str(number)
            h = self.temporal_convs[number](resnet(h, emb), frames)
            if transformer is not None:
                context: Tensor | TextImageContext = conditions.text
                if name in image:
                    context = TextImageContext(conditions.text, image[name], self.image_gates[name])
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
        return deque(self.run_blocks(h, layer), maxlen=1).pop()

    def head(self, features: Tensor) -> Tensor:
        """The prediction `(b f) c h w` of the decoder's last features."""
        return self.conv_out(self.conv_act(self.conv_norm_out(features)))

    def _embed_time_and_frames(self, z_t: Tensor, t: Tensor | float, fps: Tensor | None) -> Tensor:
        """Embedding of diffusion time, frame rate and frame index, `(b f) d`."""
        b, frames = z_t.shape[:2]
        emb = self.embed_time(t, b, z_t.device)
        if self.config.fps_conditioning and fps is not None:
            emb = emb + self.fps_embedding(self.time_proj(fps.expand(b)).to(emb.dtype))
        emb = repeat(emb, "b d -> (b f) d", f=frames)
        if self.config.frame_conditioning:
            # The temporal transformers have positions, but only they; this is for the ResNet blocks.
            index = self.time_proj(torch.arange(frames, device=emb.device)).to(emb.dtype)
            emb = emb + repeat(self.frame_embedding(index), "f d -> (b f) d", b=b)
        return emb

    def _check_inputs(self, z_t: Tensor, conditions: Conditions) -> None:
        config = self.config
        if z_t.ndim != 5 or z_t.shape[2] != config.in_channels:
            raise UserError(f"latents have shape {tuple(z_t.shape)}, expected b f c h w with c={config.in_channels}")
        b, frames, _, height, width = z_t.shape
        if not 1 <= frames <= config.max_frames:
            raise UserError(f"the clip has {frames} frames; this model takes 1 to {config.max_frames}")
        stride = 2 ** (len(config.block_out_channels) - 1)
        if height % stride or width % stride or not height * width:
            raise UserError(f"latents are {height}x{width}; height and width must be multiples of {stride}")
        if len(conditions.text) != b:
            raise UserError(f"there are {len(conditions.text)} texts for {b} clips; give one text per clip")
        motion_layers = self.temporal_transformers if config.motion_attention else ()
        for name, part, layers, setting in (
            ("appearance features", conditions.appearance, self.injected, f"inject={config.inject}"),
            ("keys and values of the image", conditions.image, self.image_gates, "image_attention"),
            ("keys and values of pixels", conditions.pixels, self.pixel_attentions, "pixel_scales"),
            ("keys and values of motion", conditions.motion, motion_layers, "motion_attention"),
        ):
            if part is not None and len(part) not in (0, len(layers)):
                counts = f"{len(part)} {name} and the model has {len(layers)} layers for them"
                raise UserError(f"conditions have {counts} ({setting}); use the condition encoder of this model")
        channels = config.keyframe_channels
        if conditions.keyframe is not None and conditions.keyframe.shape[1] != channels:
            raise UserError(f"key frame does not fit keyframe_channels={channels}; use this model's condition encoder")


def set_trainable(
    unet: VideoUNet,
    condition_encoder: ConditionEncoder,
    trainable_parameters: str = "temporal",
    trainable_unet_layers: Sequence[str] = (),
) -> list[nn.Parameter]:
    """Freezes what is not trained and returns the trainable parameters, for the optimizer.

    Args:
        trainable_parameters: `temporal` freezes the 2D part of the VideoUNet, except `trainable_unet_layers`; `all` freezes
            nothing. The condition encoder is trained in both cases.
        trainable_unet_layers: modules or parameters of the 2D part by name, such as `up_blocks.1`, with all that they contain.

    Raises:
        UserError: an unknown choice, or the 2D part has nothing of such a name.
    """
    check_choice("trainable_parameters", trainable_parameters, ("temporal", "all"))
    unet.requires_grad_(trainable_parameters == "all")
    base = {name: p for name, p in unet.named_parameters() if not name.startswith(unet.new_prefixes)}
    trainable = [*unet.new_parameters(), *condition_encoder.parameters()]
    for layer in trainable_unet_layers:
        parameters = [parameter for name, parameter in base.items() if f"{name}.".startswith(f"{layer}.")]
        if not parameters:
            names = ", ".join(sorted({name.partition(".")[0] for name in base}))
            raise UserError(f"trainable_unet_layers names '{layer}', and no 2D layer has that name; begin with {names}")
        trainable += parameters
    for parameter in trainable:
        parameter.requires_grad_(True)
    return [p for net in (unet, condition_encoder) for p in net.parameters() if p.requires_grad]
