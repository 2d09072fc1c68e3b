"""Conditions: everything that the denoiser is given beside noise and time, computed once per clip."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor

from microcinema.errors import UserError
from microcinema.models.appearance import AppearanceNet
from microcinema.models.unet2d import load_checked, unreadable


@dataclass
class Conditions:
    """What the denoiser knows of b clips.

    Attributes:
        text: text tokens, `b n d`.
        appearance: one feature `b c h w` for every injected layer (zero: no image), or None.
        keyframe: key-frame latents for the input channels, `b c h w` (zero: no image), or None.
        fps: frames per second, `(b,)`, or None.
    """

    text: Tensor
    appearance: tuple[Tensor, ...] | None = None
    keyframe: Tensor | None = None
    fps: Tensor | None = None

    def to(self, *args: Any, **kwargs: Any) -> "Conditions":
        """All tensors moved or cast as by `Tensor.to`."""
        return Conditions(*(_map(getattr(self, field.name), lambda x: x.to(*args, **kwargs)) for field in fields(self)))

    @staticmethod
    def cat(conditions: Sequence["Conditions"]) -> "Conditions":
        """One batch of several, in order.

        Raises:
            UserError: a field is None in some and not in others.
        """
        columns = {field.name: [getattr(c, field.name) for c in conditions] for field in fields(Conditions)}
        joined: dict[str, Any] = {}
        for name, values in columns.items():
            absent = [value is None for value in values]
            if any(absent) and not all(absent):
                raise UserError(
                    f"cannot join conditions of which only some have '{name}'; give it to all (zero means no image)"
                )
            if any(absent):
                joined[name] = None
            elif name == "appearance":
                joined[name] = tuple(torch.cat(features) for features in zip(*values, strict=True))
            else:
                joined[name] = torch.cat(values)
        return Conditions(**joined)


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(function(x) for x in value)
    return None if value is None else function(value)


class ConditionEncoder(ModelMixin, ConfigMixin):
    """The trainable networks that make Conditions of text tokens and a key frame.

    Args:
        appearance: constructor arguments of the AppearanceNet, or None for none.
        keyframe_concat: hand the key frame's latents on for the denoiser's input channels.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = AppearanceNet._no_split_modules
    _skip_layerwise_casting_patterns = AppearanceNet._skip_layerwise_casting_patterns

    @register_to_config
    def __init__(self, appearance: dict[str, Any] | None = None, keyframe_concat: bool = False):
        super().__init__()
        # Without networks this still has a dtype and a device, which diffusers' pipelines ask for, and can be asked for checkpoints.
        self.register_buffer("anchor", torch.zeros(()), persistent=False)
        self.gradient_checkpointing = False
        self.appearance_net = None if appearance is None else AppearanceNet(**appearance)

    @classmethod
    def from_unet2d(
        cls,
        unet: UNet2DConditionModel,
        *,
        fusion: str | None = "add",
        inject: str | None = "both",
        keyframe_concat: bool = False,
    ) -> "ConditionEncoder":
        """A new encoder for a base UNet; its AppearanceNet (none if `fusion` is None) starts as a copy of the UNet.

        Raises:
            UserError: an unknown fusion or inject, or an unsupported UNet.
        """
        if fusion is None:
            return cls(keyframe_concat=keyframe_concat)
        net = AppearanceNet.from_unet2d(unet, fusion=fusion, inject=inject or "both")
        arguments = {k: v for k, v in net.config.items() if not k.startswith("_")}
        encoder = cls(appearance=arguments, keyframe_concat=keyframe_concat)
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
        if config["appearance"] is None:  # no weights, so no weight file either
            net = cls.from_config(config)
            return (net, {"missing_keys": [], "unexpected_keys": []}) if kwargs.get("output_loading_info") else net
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

    def forward(
        self, text: Tensor, z_ref: Tensor, fps: Tensor | None = None, keep_image: Tensor | None = None
    ) -> Conditions:
        """Encodes b clips.

        Args:
            text: text tokens, `b n d`.
            z_ref: clean latents of the key frames, `b c h w`.
            fps: frames per second, `(b,)`, or None.
            keep_image: bool `(b,)`; where it is False the clip gets zero features and a zero key frame. None keeps all.
        """
        if z_ref.ndim != 4 or text.ndim != 3 or len(z_ref) != len(text):
            raise UserError(
                f"text {tuple(text.shape)} and key frame {tuple(z_ref.shape)} must be b n d and b c h w with the same b"
            )
        appearance = self.appearance_net(z_ref, text) if self.appearance_net is not None else None
        keyframe = z_ref if self.config.keyframe_concat else None
        if keep_image is not None:
            keep = rearrange(keep_image, "b -> b 1 1 1")
            # where, not a product: a dropped image leaves nothing, not even a NaN, and no gradient.
            appearance, keyframe = (
                _map(x, lambda y: torch.where(keep, y, torch.zeros_like(y))) for x in (appearance, keyframe)
            )
        return Conditions(text=text, appearance=appearance, keyframe=keyframe, fps=fps)
