"""VideoUNet: the denoiser. The blocks of a 2D UNet on every frame, with temporal layers and conditioning between them.

Growing it from a pretrained 2D UNet is MicroCinema's (arXiv 2311.18829) and Factorized-Dreamer's (arXiv 2408.10119). Which of its parts are
the authors' and which are ours is said by their modules, and by docs/method.md.

Shapes: b clips, f frames, c channels, h w spatial size, n text tokens, d text width, p patch tokens, e width of the image encoder,
k motion tokens, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from einops import rearrange
from pydantic import ValidationError
from torch import Tensor, nn

from microcinema.config.instantiate import reasons
from microcinema.config.network import NetworkOptions, VideoUNetConfig
from microcinema.models.appearance import (
    AppearanceEmbedding,
    AppearNet,
    ReferenceNet,
    combine,
    embedding_sources,
    fuse,
    make_injections,
)
from microcinema.models.attention import zero_init
from microcinema.models.conditioning import Conditions, drop
from microcinema.models.image_adapter import TextImageAdapter
from microcinema.models.pixel_attention import PixelAwareCrossAttention, PixelAwareTransformer, PixelPyramid
from microcinema.models.unet2d import (
    LayerSpec,
    StepCache,
    TextImageContext,
    layer_specs,
    spatial_transformer,
    unet2d_arguments,
)
from microcinema.models.unet3d import UNet3D
from microcinema.models.weights import check_keys
from microcinema.utils.errors import UserError, check_choice, user_errors


class VideoUNet(UNet3D, ModelMixin, PeftAdapterMixin, ConfigMixin):
    """Denoiser of clips, `z_t, t, conditions -> prediction`. At initialization it equals its 2D UNet on every frame.

    `encode` computes once per clip what depends on neither noise nor time. A layer is: ResNet block with its temporal convolutions,
    spatial transformer, pixel-aware attention, temporal transformer (the transformers where the 2D UNet has one). AppearNet's
    embeddings enter the ResNet block and after the temporal transformer, ReferenceNet's before pixel-aware attention.

    Args:
        the fields of `VideoUNetConfig`, as plain values.
    """

    new_prefixes = (
        *UNet3D.new_prefixes,
        "keyframe_conv_in.",
        "placed_gates.",
        "appear_net.",
        "reference_net.",
        "injections.",
        "image_adapter.",
        "image_gates.",
        "pixel_pyramid.",
        "pixel_attentions.",
    )
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["BasicTransformerBlock", "HalvedResnetBlock2D"]
    _skip_layerwise_casting_patterns: ClassVar = ["norm"]

    @register_to_config
    def __init__(
        self,
        unet2d: dict[str, Any],
        temporal: dict[str, Any],
        max_frames: int = 32,
        keyframe_concat: bool = False,
        keyframe_places: bool = False,
        fps_conditioning: bool = True,
        motion_score: bool = False,
        keyframe_noise: bool = False,
        appearance: dict[str, Any] | None = None,
        adapter: dict[str, Any] | None = None,
        pixels: dict[str, Any] | None = None,
        image_width: int | None = None,
        motion_width: int | None = None,
        vae_scale_factor: int = 8,
    ):
        super().__init__()
        self.options = options = _checked_options({name: self.config[name] for name in _FIELDS})
        self._build_unet2d(options.unet2d)
        self._build_temporal_layers(options)
        specs = layer_specs(self)
        if options.keyframe_concat:
            # A separate convolution, since that of a concatenation is a sum. No bias: a dropped key frame must add nothing.
            conv_in = nn.Conv2d(self.conv_in.in_channels, self.conv_in.out_channels, 3, padding=1, bias=False)
            self.keyframe_conv_in = zero_init(conv_in)
        if options.keyframe_places:
            width, channels = self.time_embedding.linear_2.out_features, self.conv_out.out_channels
            self.placed_gates = zero_init(nn.Linear(width, 2 * channels))
        self._build_appearance(options, specs)
        self._build_adapter(options, specs)
        self._build_pixel_attention(options, specs)

    def _build_appearance(self, options: VideoUNetConfig, specs: list[LayerSpec]) -> None:
        self.sources: dict[int, tuple[int, ...]] = {}
        if options.appearance is None:
            return
        if options.appearance.network == "reference_net":
            self.reference_net = ReferenceNet(options)
        else:
            self.appear_net = AppearNet(options)
            self.sources = embedding_sources(self, options.appearance.inject)
            self.injections = make_injections(specs, self.sources, options.appearance)

    def _build_adapter(self, options: VideoUNetConfig, specs: list[LayerSpec]) -> None:
        self.image_gates = nn.ParameterDict()
        if options.adapter is None:
            return
        assert options.image_width is not None
        widths = {str(i): spec.width for i, spec in enumerate(specs) if spec.has_attention}
        if options.adapter.mode == "concat":
            widths = {}
        text_width = options.unet2d["cross_attention_dim"]
        self.image_adapter = TextImageAdapter(
            options.image_width, text_width, list(widths.values()), options.adapter.num_tokens
        )
        # As pairs: a ParameterDict sorts the keys of a dict, "10" before "2".
        self.image_gates = nn.ParameterDict([(i, torch.zeros(width)) for i, width in widths.items()])

    def _build_pixel_attention(self, options: VideoUNetConfig, specs: list[LayerSpec]) -> None:
        self.pixel_scales: dict[str, int] = {}  # of the layers with pixel-aware attention, by number
        self.pixel_attentions = nn.ModuleDict()
        if options.pixels is None:
            return
        decoder = sum(len(block.resnets) for block in (*self.down_blocks, self.mid_block))
        whole = options.pixels.block == "transformer"  # PASD's, in every layer of the decoder
        layers = {i: spec for i, spec in enumerate(specs) if (i >= decoder if whole else spec.has_attention)}
        available = sorted({spec.scale for spec in layers.values()})
        scales = available if options.pixels.scales is None else list(options.pixels.scales)
        if missing := sorted(set(scales) - set(available)):
            raise UserError(
                f"pixels.scales has {missing[0]}, but there are layers for it only at {available}; use these"
            )
        self.pixel_pyramid = PixelPyramid(options.vae_scale_factor, scales)
        block, groups = PixelAwareTransformer if whole else PixelAwareCrossAttention, self.conv_norm_out.num_groups
        for i, spec in layers.items():
            if spec.scale in scales:
                self.pixel_scales[str(i)] = spec.scale
                self.pixel_attentions[str(i)] = block(spec.width, groups, self.pixel_pyramid.width(spec.scale))

    @classmethod
    def from_unet2d(
        cls,
        unet: UNet2DConditionModel,
        options: NetworkOptions,
        image_width: int | None = None,
        motion_width: int | None = None,
        vae_scale_factor: int = 8,
    ) -> "VideoUNet":
        """A VideoUNet that starts as a 2D UNet, and its AppearNet or ReferenceNet as a copy of it.

        Args:
            options: `model` of a training config, or `VideoUNetConfig`.
            image_width, motion_width, vae_scale_factor: see `VideoUNetConfig`.

        Raises:
            UserError: the UNet is not supported, its keys do not match, or a part lacks its frozen encoder.
        """
        arguments = {field.name: getattr(options, field.name) for field in fields(NetworkOptions)}
        arguments |= {"image_width": image_width, "motion_width": motion_width, "vae_scale_factor": vae_scale_factor}
        net = cls(**asdict(_checked_options({**arguments, "unet2d": unet2d_arguments(dict(unet.config))})))
        for backbone in (net, getattr(net, "appear_net", None), getattr(net, "reference_net", None)):
            if backbone is not None:
                backbone.load_unet2d(unet)
        return net

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, but a folder that cannot be read and a missing or unexpected key are a UserError."""
        path, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        fault = f"cannot load a network from '{path}' ({{reason}})"
        with user_errors(f"{fault}; give one written by save_pretrained"):
            network, info = super().from_pretrained(path, output_loading_info=True, **kwargs)
        check_keys(info["missing_keys"], info["unexpected_keys"], f"'{path}'")
        return (network, info) if with_info else network

    @property
    def stride(self) -> int:
        """Height and width of the latents are multiples of it."""
        return 2 ** (len(self.options.unet2d["block_out_channels"]) - 1)

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters that the 2D UNet does not have."""
        return [parameter for name, parameter in self.named_parameters() if name.startswith(self.new_prefixes)]

    def encode(
        self,
        text: Tensor,
        z_ref: Tensor,
        fps: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
        pixels: Tensor | None = None,
        motion_tokens: Tensor | None = None,
        placed: Tensor | None = None,
        motion_score: Tensor | None = None,
        keyframe_noise: Tensor | None = None,
    ) -> Conditions:
        """The conditions of b clips. Inputs of parts that the network does not have are ignored.

        Args:
            text: text tokens, `b n d`; for SDXL `b n+1 d`, see `split_text`.
            z_ref: clean latents of the key frames, `b c h w`.
            fps: frames per second, `(b,)`.
            image_mask: bool `(b,)`, False where the key frame is dropped (zero features, zero latents); None: all are kept.
            image_tokens: the image encoder's tokens of the key frames, `b p e`.
            pixels: the key frames, `b 3 H W` in [-1, 1].
            motion_tokens: the motion encoder's tokens, `b k e`, zero where they are padding.
            placed: key frames at their places, `b f c+1 h w`, see `place_keyframes`.
            motion_score: how much moves (data/motion_score.py), `(b,)`, negative where that is dropped; None: everywhere.
            keyframe_noise: level of the noise in `z_ref`, percent of a latent's deviation, `(b,)`.

        Raises:
            UserError: shapes that do not match, or an input that a part needs is missing.
        """
        if z_ref.ndim != 4 or text.ndim != 3 or len(z_ref) != len(text):
            shapes = f"text {tuple(text.shape)} and key frame {tuple(z_ref.shape)}"
            raise UserError(f"{shapes} must be b n d and b c h w with the same b")
        text, added = self.split_text(text, *(side * self.options.vae_scale_factor for side in z_ref.shape[-2:]))
        parts: dict[str, Any] = {}
        if self.options.keyframe_concat or self.sources:
            parts["keyframe"] = z_ref
        if self.options.keyframe_places:
            parts["placed"] = _required(placed, "key frames at their places are missing; give place_keyframes(...)")
        if hasattr(self, "reference_net"):
            parts["reference"] = self.reference_net(z_ref, text, added)
        image: Any = None
        if hasattr(self, "image_adapter"):
            tokens = _required(image_tokens, "the adapter reads image tokens; give those of the key frame")
            image = self.image_adapter(text, tokens)
        if hasattr(self, "pixel_pyramid"):
            pixels = _required(pixels, "pixel-aware attention reads the key frame's pixels; give them")
            parts["pixels"] = self.pixel_pyramid(pixels)
        if image_mask is not None:
            parts, image = {name: drop(value, image_mask) for name, value in parts.items()}, drop(image, image_mask)
        if self.image_gates:
            parts["image"] = image
        elif image is not None:
            text = torch.cat([text, image], dim=1)
        if self.options.motion_width is not None:
            parts["motion"] = _required(motion_tokens, "motion tokens are missing; give those of the motion caption")
        numbers: dict[str, Any] = {"fps": fps, "motion_score": motion_score, "keyframe_noise": keyframe_noise}
        return Conditions(text=text, added=added, **numbers, **parts)

    def forward(self, z_t: Tensor, t: Tensor | float, conditions: Conditions, cache: StepCache | None = None) -> Tensor:
        """The prediction `b f c h w`, of the target that the model was trained for.

        Args:
            z_t: noisy latents, `b f c h w`.
            t: diffusion time, a number or `(b,)`.
            cache: of deep features, which the call takes from it or leaves there; None: none is taken.

        Raises:
            UserError: the latents or the conditions do not fit the network.
        """
        return self.head(self.features(z_t, t, conditions, cache), z_t, t, conditions)

    def features(
        self, z_t: Tensor, t: Tensor | float, conditions: Conditions, cache: StepCache | None = None
    ) -> Tensor:
        """The decoder's last features, `(b f) c h w`, for the arguments of `forward`."""
        self._check_inputs(z_t, conditions)
        frames, emb = z_t.shape[1], self.embed_time_and_frames(z_t, t, conditions)
        groups, reference = self.conv_norm_out.num_groups, {}
        if conditions.reference is not None:
            reference = dict(zip(self.reference_net.injected, conditions.reference, strict=True))
        image = dict(zip(self.image_gates, conditions.image or (), strict=False))
        pixel_attentions: Any = self.pixel_attentions
        pixels = dict(zip(sorted(set(self.pixel_scales.values())), conditions.pixels or (), strict=False))
        appearance: dict[int, AppearanceEmbedding] = {}
        if self.sources:
            embeddings = self.appear_net(z_t, t, conditions, cache)
            known = {layer: sources for layer, sources in self.sources.items() if max(sources) < len(embeddings)}
            appearance = {layer: combine(embeddings, sources) for layer, sources in known.items()}

        def layer(number: int, resnet: nn.Module, transformer: Any, h: Tensor) -> tuple[Tensor, None]:
            name = str(number)
            injection: Any = self.injections[name] if number in appearance else None
            scale_shift = injection.scale_shift(appearance[number].resnet) if injection else None
            h = self.res_block(number, resnet, h, emb, frames, scale_shift)
            if transformer is not None:
                context: Tensor | TextImageContext = conditions.text
                if name in image:
                    context = TextImageContext(conditions.text, image[name], self.image_gates[name])
                h = spatial_transformer(transformer, h, context)
            if number in reference:
                h = fuse(h, reference[number], self.reference_net.fusion, groups)
            if pixels and name in self.pixel_scales:
                h = pixel_attentions[name](h, pixels[self.pixel_scales[name]])
            if transformer is not None:
                h = self.temporal_attention(number, h, frames, conditions)
            if injection:
                h = injection.add(h, appearance[number].attention)
            return h, None

        h = self.embed_latents(z_t, conditions)
        if self.options.keyframe_concat and conditions.keyframe is not None:
            h = fuse(h, self.keyframe_conv_in(conditions.keyframe), "add", groups)
        return self.run_blocks(h, layer, lambda number, x: self.after_resampling(number, x, frames), cache)[0]

    def head(self, features: Tensor, z_t: Tensor, t: Tensor | float, conditions: Conditions) -> Tensor:
        """The prediction `b f c h w` of the decoder's last features, for the arguments of `forward`.

        Placed key frames, and the blend between two of them, are added with a learned gate for each channel, which depends on diffusion time
        and frame: a network that has to draw both anew from features loses fine detail.
        """
        h = self.conv_out(self.conv_act(self.conv_norm_out(features)))
        h = rearrange(h, "(b f) c h w -> b f c h w", b=len(z_t))
        if self.options.keyframe_places and conditions.placed is not None:
            gates = self.placed_gates(self.embed_time_and_frames(z_t, t, conditions))
            at_places, between = rearrange(gates, "(b f) (n c) -> n b f c 1 1", b=len(z_t), n=2)
            latents, mask = conditions.placed[:, :, :-1], conditions.placed[:, :, -1:]
            h = h + (between + mask * (at_places - between)) * latents
        return h

    def _check_inputs(self, z_t: Tensor, conditions: Conditions) -> None:
        channels = self.options.unet2d.get("in_channels", 4)
        if z_t.ndim != 5 or z_t.shape[2] != channels:
            raise UserError(f"latents have shape {tuple(z_t.shape)}, expected b f c h w with c={channels}")
        b, frames, _, height, width = z_t.shape
        if not 1 <= frames <= self.options.max_frames:
            raise UserError(f"the clip has {frames} frames; this model takes 1 to {self.options.max_frames}")
        if height % self.stride or width % self.stride or not height * width:
            raise UserError(f"latents are {height}x{width}; height and width must be multiples of {self.stride}")
        if len(conditions.text) != b:
            raise UserError(f"there are {len(conditions.text)} texts for {b} clips; give one text per clip")
        if conditions.placed is not None and conditions.placed.shape[1] != frames:
            placed = f"key frames are placed in {conditions.placed.shape[1]} frames"
            raise UserError(f"{placed}, and the clip has {frames}; place them in as many")
        layers = len(self.reference_net.injected) if hasattr(self, "reference_net") else 0
        for name, part, count in (
            ("appearance features", conditions.reference, layers),
            ("keys and values of the image", conditions.image, len(self.image_gates)),
            ("features of pixels", conditions.pixels, len(set(self.pixel_scales.values()))),
        ):
            if part is not None and len(part) not in (0, count):
                raise UserError(
                    f"conditions have {len(part)} {name}, and this network uses {count}; use its own encode"
                )


_FIELDS = [field.name for field in fields(VideoUNetConfig)]


def _checked_options(arguments: dict[str, Any]) -> VideoUNetConfig:
    try:
        return VideoUNetConfig(**arguments)
    except ValidationError as error:
        details = error.errors()
        raise UserError(f"{'.'.join(map(str, details[0]['loc'])) or 'model'}: {reasons(details)}") from None


def _required(value: Tensor | None, message: str) -> Tensor:
    if value is None:
        raise UserError(message)
    return value


def set_trainable(
    unet: VideoUNet, trainable_parameters: str = "temporal", trainable_unet_layers: Sequence[str] = ()
) -> list[nn.Parameter]:
    """Freezes what is not trained and returns the trainable parameters, for the optimizer.

    Args:
        trainable_parameters: `temporal` freezes the 2D part of the VideoUNet, except `trainable_unet_layers`; `all` freezes nothing.
        trainable_unet_layers: modules or parameters of the 2D part by name, such as `up_blocks.1`, with all that they contain.

    Raises:
        UserError: an unknown choice, or the 2D part has nothing of such a name.
    """
    check_choice("trainable_parameters", trainable_parameters, ("temporal", "all"))
    unet.requires_grad_(trainable_parameters == "all")
    base = {name: p for name, p in unet.named_parameters() if not name.startswith(unet.new_prefixes)}
    trainable = unet.new_parameters()
    for layer in trainable_unet_layers:
        parameters = [parameter for name, parameter in base.items() if f"{name}.".startswith(f"{layer}.")]
        if not parameters:
            names = ", ".join(sorted({name.partition(".")[0] for name in base}))
            raise UserError(f"trainable_unet_layers names '{layer}', and no 2D layer has that name; begin with {names}")
        trainable += parameters
    for parameter in trainable:
        parameter.requires_grad_(True)
    return [p for p in unet.parameters() if p.requires_grad]
