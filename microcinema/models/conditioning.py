"""Conditions: the inputs of the denoiser apart from noisy latents and time, and the networks that compute them once per clip.

Shapes: b clips, n text tokens, d text width, p patch tokens, e width of the image encoder, k motion tokens, c h w latents of a key
frame or a feature, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from microcinema.models.appearance import AppearanceNet
from microcinema.models.attention import KeyValue
from microcinema.models.image_adapter import MODES, TextImageAdapter
from microcinema.models.pixel_attention import PixelPyramid
from microcinema.models.unet2d import LayerSpec, layer_specs
from microcinema.models.weights import load_checked, unreadable
from microcinema.utils.errors import UserError, check_choice


@dataclass
class Conditions:
    """Conditions of b clips. A part that the model does not have is None; zero stands for a dropped key frame."""

    text: Tensor  # text tokens, b n d
    appearance: tuple[Tensor, ...] | None = None  # a feature b c h w for every injected layer
    keyframe: Tensor | None = None  # latents of the key frame for the input channels, b c h w
    fps: Tensor | None = None  # frames per second, (b,)
    image: tuple[KeyValue, ...] | None = None  # of the adapter's image tokens, for every spatial cross-attention
    pixels: tuple[KeyValue, ...] | None = None  # of the key frame's pixels, for every pixel-aware layer
    motion: tuple[KeyValue, ...] | None = None  # of the motion caption, for every temporal transformer


class ConditionEncoder(ModelMixin, ConfigMixin):
    """The trainable networks that compute Conditions from text tokens and a key frame.

    Args:
        appearance: constructor arguments of the AppearanceNet; None: none.
        keyframe_concat: pass the key frame's latents to the denoiser's input channels.
        adapter: constructor arguments of the TextImageAdapter; None: none. Without widths, its tokens are appended to the text.
        pixels: constructor arguments of the PixelPyramid; None: none.
        motion: `width` of the motion tokens and `widths` of the temporal transformers; None: no motion attention.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = AppearanceNet._no_split_modules
    _skip_layerwise_casting_patterns = AppearanceNet._skip_layerwise_casting_patterns

    @register_to_config
    def __init__(
        self,
        appearance: dict[str, Any] | None = None,
        keyframe_concat: bool = False,
        adapter: dict[str, Any] | None = None,
        pixels: dict[str, Any] | None = None,
        motion: dict[str, Any] | None = None,
    ):
        super().__init__()
        # An encoder without networks needs a dtype and a device too, which the pipelines of diffusers ask for.
        self.register_buffer("anchor", torch.zeros(()), persistent=False)
        self.gradient_checkpointing = False
        self.appearance_net = None if appearance is None else AppearanceNet(**appearance)
        self.image_adapter = None if adapter is None else TextImageAdapter(**adapter)
        self.pixel_pyramid = None if pixels is None else PixelPyramid(**pixels)
        self.motion_to_kv = None
        if motion is not None:
            layers = (nn.Linear(motion["width"], 2 * width, bias=False) for width in motion["widths"])
            self.motion_to_kv = nn.ModuleList(layers)

    @classmethod
    def from_unet2d(
        cls,
        unet: UNet2DConditionModel,
        *,
        fusion: str | None = "add",
        inject: str | None = "both",
        keyframe_concat: bool = False,
        adapter: str | None = None,
        num_image_tokens: int = 16,
        image_width: int | None = None,
        pixel_scales: Sequence[int] = (),
        vae_scale_factor: int = 8,
        motion_attention: bool = False,
        motion_width: int | None = None,
        temporal_bottleneck: int = 2,
    ) -> "ConditionEncoder":
        """A new encoder for a base UNet. Its AppearanceNet starts as a copy of the UNet.

        Args:
            fusion, inject: of the AppearanceNet; fusion None: none.
            adapter, num_image_tokens: mode of the TextImageAdapter (None: none) and number of its tokens.
            image_width, motion_width: widths of the tokens of image and motion encoder.
            pixel_scales, motion_attention, temporal_bottleneck: of the VideoUNet.
            vae_scale_factor: pixels per latent position.

        Raises:
            UserError: an unknown choice, an unsupported UNet, or a part without its frozen encoder.
        """
        layers = [spec for spec in layer_specs(unet) if spec.has_attention]
        config: dict[str, Any] = {"keyframe_concat": keyframe_concat}
        if adapter is not None:
            check_choice("adapter", adapter, MODES)
            if image_width is None:
                raise UserError(f"adapter={adapter} needs an image encoder; name one, or set the adapter to null")
            config["adapter"] = {
                "image_width": image_width,
                "text_width": unet.config["cross_attention_dim"],
                "widths": [spec.width for spec in layers] if adapter == "decoupled" else [],
                "num_tokens": num_image_tokens,
            }
        if pixel_scales:
            config["pixels"] = _pixel_config(layers, pixel_scales, vae_scale_factor)
        if motion_attention:
            if motion_width is None:
                raise UserError("motion_attention=true needs a motion encoder; name one, or set it to false")
            widths = [spec.width // temporal_bottleneck for spec in layers]
            config["motion"] = {"width": motion_width, "widths": widths}
        if fusion is None:
            return cls(**config)
        net = AppearanceNet.from_unet2d(unet, fusion=fusion, inject=inject or "both")
        encoder = cls(appearance={k: v for k, v in net.config.items() if not k.startswith("_")}, **config)
        encoder.appearance_net = net
        return encoder

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, but a folder that cannot be read and a missing or unexpected key are a UserError."""
        try:
            config = cls.load_config(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            raise unreadable(pretrained_model_name_or_path, error) from error
        # Without networks there are no weights, and so no weight file.
        if not any(config.get(part) for part in ("appearance", "adapter", "pixels", "motion")):
            net = cls.from_config(config)
            return (net, {"missing_keys": [], "unexpected_keys": []}) if kwargs.get("output_loading_info") else net
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

    def forward(
        self,
        text: Tensor,
        z_ref: Tensor,
        fps: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
        pixels: Tensor | None = None,
        motion_tokens: Tensor | None = None,
    ) -> Conditions:
        """Encodes b clips. Inputs of parts that this encoder does not have are ignored.

        Args:
            text: text tokens, `b n d`.
            z_ref: clean latents of the key frames, `b c h w`.
            fps: frames per second, `(b,)`.
            image_mask: bool `(b,)`, False where the key frame is dropped (zero features, zero latents); None: all are kept.
            image_tokens: the image encoder's tokens of the key frames, `b p e`.
            pixels: the key frames, `b 3 H W` in [-1, 1].
            motion_tokens: the motion encoder's tokens, `b k e`, zero where they are padding.

        Raises:
            UserError: shapes that do not match, or an input that a part needs is missing.
        """
        if z_ref.ndim != 4 or text.ndim != 3 or len(z_ref) != len(text):
            shapes = f"text {tuple(text.shape)} and key frame {tuple(z_ref.shape)}"
            raise UserError(f"{shapes} must be b n d and b c h w with the same b")
        parts = self._encode_keyframe(text, z_ref, image_tokens, pixels)
        if image_mask is not None:
            # where, not a product: a dropped image leaves nothing, not even a NaN, and no gradient.
            def mask(value: Any) -> Any:
                if isinstance(value, KeyValue):
                    return KeyValue(mask(value.key), mask(value.value))
                if isinstance(value, tuple):
                    return tuple(mask(x) for x in value)
                return torch.where(image_mask.reshape(-1, *[1] * (value.ndim - 1)), value, torch.zeros_like(value))

            parts = {name: mask(value) for name, value in parts.items()}
        if (appended := parts.pop("appended_text", None)) is not None:
            text = torch.cat([text, appended], dim=1)
        if self.motion_to_kv is not None:
            tokens = _required(motion_tokens, "motion attention reads motion tokens; give those of the motion caption")
            padding_mask = tokens.any(-1)
            pairs = (to_kv(tokens).chunk(2, dim=-1) for to_kv in self.motion_to_kv)
            parts["motion"] = tuple(KeyValue(key, value, padding_mask) for key, value in pairs)
        return Conditions(text=text, fps=fps, **parts)

    def _encode_keyframe(
        self, text: Tensor, z_ref: Tensor, image_tokens: Tensor | None, pixels: Tensor | None
    ) -> dict[str, Any]:
        """The fields of Conditions that depend on the key frame, and the tokens to append to the text, `appended_text`."""
        parts: dict[str, Any] = {}
        if self.appearance_net is not None:
            parts["appearance"] = self.appearance_net(z_ref, text)
        if self.config.keyframe_concat:
            parts["keyframe"] = z_ref
        if self.image_adapter is not None:
            tokens = _required(image_tokens, "the adapter reads image tokens; give those of the key frame")
            if self.image_adapter.to_kv:
                parts["image"] = self.image_adapter(text, tokens)
            else:
                parts["appended_text"] = self.image_adapter.tokens(text, tokens)
        if self.pixel_pyramid is not None:
            pixels = _required(pixels, "pixel-aware attention reads the key frame's pixels; give them")
            parts["pixels"] = self.pixel_pyramid(pixels)
        return parts


def _pixel_config(layers: Sequence[LayerSpec], scales: Sequence[int], downsampling: int) -> dict[str, Any]:
    """Constructor arguments of the PixelPyramid."""
    pixel_layers = [(spec.scale, spec.width) for spec in layers if spec.scale in scales]
    if missing := sorted(set(scales) - {scale for scale, _ in pixel_layers}):
        available = sorted({spec.scale for spec in layers})
        raise UserError(f"pixel_scales has {missing[0]}, but the base has transformers only at {available}; use these")
    return {"downsampling": downsampling, "scales": list(scales), "layers": pixel_layers}


def _required(value: Tensor | None, message: str) -> Tensor:
    if value is None:
        raise UserError(message)
    return value
