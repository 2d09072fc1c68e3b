"""The options of VideoUNet: what `model` in a training config may set, and what a saved network's config.json holds.

Every part is a mapping, or None where the network does not have it. Meanings and presets: `configs/model/`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from microcinema.config.types import CONFIG, Size


@dataclass(frozen=True, config=CONFIG)
class Temporal:
    convolutions: Literal["inside", "after"]
    attention_bottleneck: Size
    feed_forward: Size
    text: bool
    positions: bool
    frame_embedding: bool


@dataclass(frozen=True, config=CONFIG)
class Appearance:
    network: Literal["appear_net", "reference_net"]
    inject: Literal["encoder", "decoder", "both"]
    fusion: Literal["add", "scale_shift", "both"]

    def __post_init__(self) -> None:
        if self.network == "reference_net" and self.fusion == "both":
            raise ValueError(
                "reference_net has one feature per layer, so fusion is add or scale_shift; use one of them"
            )


@dataclass(frozen=True, config=CONFIG)
class Adapter:
    mode: Literal["decoupled", "concat"]
    num_tokens: Size


@dataclass(frozen=True, config=CONFIG)
class Pixels:
    block: Literal["transformer", "attention"]
    scales: Annotated[tuple[Size, ...], Field(min_length=1)] | None


@dataclass(frozen=True, config=CONFIG)
class NetworkOptions:
    max_frames: Size
    keyframe_concat: bool
    keyframe_places: bool
    fps_conditioning: bool
    motion_score: bool
    keyframe_noise: bool
    temporal: Temporal
    appearance: Appearance | None
    adapter: Adapter | None
    pixels: Pixels | None


@dataclass(frozen=True, config=CONFIG)
class VideoUNetConfig(NetworkOptions):
    """Everything that decides the modules of a VideoUNet.

    Attributes:
        unet2d: arguments of the UNet2DConditionModel that it grows from.
        image_width, motion_width: widths of the tokens of image and motion encoder; None: there is no such encoder.
        vae_scale_factor: pixels per latent position.
    """

    unet2d: dict[str, Any]
    image_width: Size | None
    motion_width: Size | None
    vae_scale_factor: Size

    def __post_init__(self) -> None:
        if self.adapter is not None and self.image_width is None:
            raise ValueError(
                f"adapter={self.adapter.mode} needs an image encoder; name one, or set the adapter to null"
            )
        if self.keyframe_noise and (self.pixels is not None or self.keyframe_places):
            fault = "keyframe_noise=true, but pixels or keyframe_places let the network see the key frame without noise"
            raise ValueError(f"{fault}; set pixels=null and keyframe_places=false")
        if self.temporal.attention_bottleneck > (narrowest := min(self.unet2d["block_out_channels"])):
            fault = f"temporal.attention_bottleneck={self.temporal.attention_bottleneck} leaves layers no channel"
            raise ValueError(f"{fault}; use at most {narrowest}, the channels of the narrowest")
        if self.motion_width is not None and not self.temporal.text:
            raise ValueError("the motion encoder's tokens are for temporal attention; set temporal.text=true")
