"""Conditions: everything that the denoiser is given beside noise and time, computed once per clip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from microcinema.models.appearance import AppearanceNet, check_choice
from microcinema.models.image_adapter import MODES, TextImageAdapter
from microcinema.models.pixel_attention import PixelPyramid
from microcinema.models.temporal import KeyValue
from microcinema.models.unet2d import layer_specs, load_checked, unreadable
from microcinema.utils.errors import UserError


@dataclass
class Conditions:
    """What the denoiser knows of b clips.

    Attributes:
        text: text tokens, `b n d`.
        appearance: one feature `b c h w` for every injected layer (zero: no image), or None.
        keyframe: key-frame latents for the input channels, `b c h w` (zero: no image), or None.
        fps: frames per second, `(b,)`, or None.
        image: keys and values of the adapter's image tokens for every spatial cross-attention (zero: no image), or None.
        pixels: keys and values of the key frame's pixels for every layer that looks at them (zero: no image), or None.
        motion: keys and values of the motion caption for every temporal transformer, or None.
    """

    text: Tensor
    appearance: tuple[Tensor, ...] | None = None
    keyframe: Tensor | None = None
    fps: Tensor | None = None
    image: tuple[KeyValue, ...] | None = None
    pixels: tuple[KeyValue, ...] | None = None
    motion: tuple[KeyValue, ...] | None = None

    def to(self, *args: Any, **kwargs: Any) -> "Conditions":
        """All tensors moved, and all numbers cast, as by `Tensor.to`; masks stay masks."""

        def move(x: Tensor) -> Tensor:
            moved = x.to(*args, **kwargs)
            return moved if x.is_floating_point() else moved.to(x.dtype)

        return Conditions(*(_map(getattr(self, field.name), move) for field in fields(self)))

    @staticmethod
    def cat(conditions: Sequence["Conditions"]) -> "Conditions":
        """One batch of several, in order.

        Raises:
            UserError: a field is None in some and not in others.
        """
        return Conditions(
            *(_join(field.name, [getattr(c, field.name) for c in conditions]) for field in fields(Conditions))
        )


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of every tensor in a tree of tuples and None."""
    if isinstance(value, tuple):
        return _like(value, [_map(x, function) for x in value])
    return None if value is None else function(value)


def _join(name: str, values: Sequence[Any]) -> Any:
    """Trees of one shape joined, tensor by tensor."""
    absent = [value is None for value in values]
    if all(absent):
        return None
    if any(absent):
        raise UserError(
            f"cannot join conditions of which only some have '{name}'; give it to all (zero means no image)"
        )
    if isinstance(values[0], tuple):
        return _like(values[0], [_join(name, column) for column in zip(*values, strict=True)])
    return torch.cat(list(values))


def _like(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


class ConditionEncoder(ModelMixin, ConfigMixin):
    """The trainable networks that make Conditions of text tokens and a key frame.

    Args:
        appearance: constructor arguments of the AppearanceNet, or None for none.
        keyframe_concat: hand the key frame's latents on for the denoiser's input channels.
        adapter: constructor arguments of the TextImageAdapter, or None for none. Without widths, its tokens join the text's.
        pixels: constructor arguments of the PixelPyramid, or None for none.
        motion: `width` of the motion tokens and `widths` of the temporal transformers, or None for no motion attention.
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
        # Without networks this still has a dtype and a device, which diffusers' pipelines ask for, and can be asked for checkpoints.
        self.register_buffer("anchor", torch.zeros(()), persistent=False)
        self.gradient_checkpointing = False
        self.appearance_net = None if appearance is None else AppearanceNet(**appearance)
        self.image_adapter = None if adapter is None else TextImageAdapter(**adapter)
        self.pixel_pyramid = None if pixels is None else PixelPyramid(**pixels)
        self.motion_to_kv = None
        if motion is not None:
            self.motion_to_kv = nn.ModuleList(
                nn.Linear(motion["width"], 2 * width, bias=False) for width in motion["widths"]
            )

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
        """A new encoder for a base UNet; its AppearanceNet (none if `fusion` is None) starts as a copy of the UNet.

        Args:
            fusion, inject: of the AppearanceNet; None for none.
            keyframe_concat: hand the key frame's latents on.
            adapter: mode of the TextImageAdapter, `decoupled` or `concat`; None for none.
            num_image_tokens: of the adapter.
            image_width: of the image encoder's tokens.
            pixel_scales: scales at which the video UNet looks at the key frame's pixels; none for no pyramid.
            vae_scale_factor: pixels per place of the latent grid.
            motion_attention: whether the temporal transformers read a motion caption.
            motion_width: of the motion encoder's tokens.
            temporal_bottleneck: of the VideoUNet.

        Raises:
            UserError: an unknown fusion, inject or adapter, an unsupported UNet, or a part without the encoder that feeds it.
        """
        shapes = layer_specs(unet)
        attending = [shape for shape in shapes if shape.attends]
        settings: dict[str, Any] = {"keyframe_concat": keyframe_concat}
        if adapter is not None:
            check_choice("adapter", adapter, MODES)
            if image_width is None:
                raise UserError(f"adapter={adapter} needs an image encoder; name one, or set the adapter to null")
            settings["adapter"] = {
                "image_width": image_width,
                "text_width": unet.config["cross_attention_dim"],
                "widths": [shape.width for shape in attending] if adapter == "decoupled" else [],
                "num_tokens": num_image_tokens,
            }
        if pixel_scales:
            layers = [(shape.scale, shape.width) for shape in attending if shape.scale in pixel_scales]
            if missing := sorted(set(pixel_scales) - {scale for scale, _ in layers}):
                there = sorted({shape.scale for shape in attending})
                raise UserError(f"pixel_scales has {missing[0]}; the base's transformers are at {there}")
            settings["pixels"] = {"downsampling": vae_scale_factor, "scales": list(pixel_scales), "layers": layers}
        if motion_attention:
            if motion_width is None:
                raise UserError("motion_attention=true needs a motion encoder; name one, or set it to false")
            widths = [shape.width // temporal_bottleneck for shape in attending]
            settings["motion"] = {"width": motion_width, "widths": widths}
        if fusion is None:
            return cls(**settings)
        net = AppearanceNet.from_unet2d(unet, fusion=fusion, inject=inject or "both")
        arguments = {k: v for k, v in net.config.items() if not k.startswith("_")}
        encoder = cls(appearance=arguments, **settings)
        encoder.appearance_net = net
        return encoder

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers' own, but a key too many or too few is an error and not a warning.

        Raises:
            UserError: nothing can be read there, or the keys do not agree with the network.
        """
        options = {
            k: kwargs[k] for k in ("subfolder", "revision", "cache_dir", "local_files_only", "token") if k in kwargs
        }
        try:
            config = cls.load_config(pretrained_model_name_or_path, **options)
        except OSError as error:
            raise unreadable(pretrained_model_name_or_path, error) from error
        if not any(
            config.get(part) for part in ("appearance", "adapter", "pixels", "motion")
        ):  # no weights, so no weight file either
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
        """Encodes b clips. What belongs to a part that this encoder does not have is ignored.

        Args:
            text: text tokens, `b n d`.
            z_ref: clean latents of the key frames, `b c h w`.
            fps: frames per second, `(b,)`, or None.
            image_mask: bool `(b,)`; where it is False the clip gets zero features and a zero key frame. None keeps all.
            image_tokens: the image encoder's patch tokens of the key frames, `b p e`.
            pixels: the key frames, `b 3 H W` in [-1, 1].
            motion_tokens: the motion encoder's tokens, `b k e`; padding is zero.

        Raises:
            UserError: shapes that do not belong together, or what a part needs is missing.
        """
        if z_ref.ndim != 4 or text.ndim != 3 or len(z_ref) != len(text):
            raise UserError(
                f"text {tuple(text.shape)} and key frame {tuple(z_ref.shape)} must be b n d and b c h w with the same b"
            )
        made: dict[str, Any] = {}
        if self.appearance_net is not None:
            made["appearance"] = self.appearance_net(z_ref, text)
        if self.config.keyframe_concat:
            made["keyframe"] = z_ref
        image_text = None
        if self.image_adapter is not None:
            if image_tokens is None:
                raise UserError("the adapter reads image tokens and got none; give those of the key frame")
            if self.image_adapter.to_kv:
                made["image"] = self.image_adapter(text, image_tokens)
            else:
                image_text = self.image_adapter.tokens(text, image_tokens)
        if self.pixel_pyramid is not None:
            if pixels is None:
                raise UserError("pixel-aware attention reads the key frame's pixels and got none; give them")
            made["pixels"] = self.pixel_pyramid(pixels)
        if image_mask is not None:
            # where, not a product: a dropped image leaves nothing, not even a NaN, and no gradient.
            def keep(x: Tensor) -> Tensor:
                return torch.where(image_mask.reshape(-1, *[1] * (x.ndim - 1)), x, torch.zeros_like(x))

            made = {name: _map(value, keep) for name, value in made.items()}
            image_text = _map(image_text, keep)
        if self.motion_to_kv is not None:
            if motion_tokens is None:
                raise UserError("motion attention reads motion tokens and got none; give those of the motion caption")
            mask = motion_tokens.any(-1)
            halves = [to(motion_tokens).chunk(2, dim=-1) for to in self.motion_to_kv]
            made["motion"] = tuple(KeyValue(key, value, mask) for key, value in halves)
        return Conditions(text=text if image_text is None else torch.cat([text, image_text], 1), fps=fps, **made)
