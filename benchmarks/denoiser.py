"""Cost of one evaluation and of one training step of VideoUNet's presets, as a ratio to the per-frame 2D UNet that they are built from.

    OMP_NUM_THREADS=1 python -m benchmarks.denoiser --clock cpu
    python -m benchmarks.denoiser --parts flops      # operations of a forward, at Stable Diffusion 1.5's width
    python -m benchmarks.denoiser --parts launches   # operations and memory traffic of a training step, at the same width

Diffusers' video UNets stand beside it, all at equal widths, head widths and depths, each with its own inputs. A round runs every network
once; the figure is the median of the ratios of each round, which other load on the machine hardly changes. A training step is forward, mean squared
error, backward.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    I2VGenXLUNet,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from einops import rearrange, repeat
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counts import LaunchCounter
from benchmarks.reporting import CLOCKS, add_timing, compare_seconds, environment, make_parser, run
from microcinema.config.compose import compose
from microcinema.models.video_unet import VideoUNet, set_trainable

REFERENCE = "2D UNet per frame"
FULL: dict[str, Any] = {
    "block_out_channels": (160, 320, 640, 640),
    "head_width": 32,
    "cross_attention_dim": 768,
    "frames": 16,
    "latents": 32,
}
STABLE_DIFFUSION: dict[str, Any] = FULL | {"block_out_channels": (320, 640, 1280, 1280), "head_width": 40}
QUICK: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "head_width": 16,
    "cross_attention_dim": 32,
    "frames": 3,
    "latents": 8,
}
TOKENS = 77
UNITS = {
    "seconds": ("seconds", 1),
    "flops": ("GFLOPs", 1e9),
    "launches": ("launches", 1),
    "bytes": ("GB", 1e9),
    "parameters": ("M parameters", 1e6),
}
PRESETS = ("plain", "microcinema", "microcinema_once", "factorized_dreamer", "factorized_dreamer_light")
# Of CLIP ViT-L and of flan-t5-base.
IMAGE_TOKENS, MOTION_TOKENS, VAE_FACTOR = (257, 1024), (32, 768), 8


class Contestant:
    """A network with its own kind of input, as a function of noisy latents `b f c h w`.

    Args:
        predict: the forward.
        networks: the networks whose gradients a training step computes (those of parameters that require one).
    """

    def __init__(self, predict: Callable[[Tensor], Tensor], *networks: nn.Module):
        self.predict = predict
        self.networks = networks

    def forward(self, z_t: Tensor) -> None:
        """One prediction without gradients."""
        for network in self.networks:
            network.eval()
        with torch.inference_mode():
            self.predict(z_t)

    def training_step(self, z_t: Tensor) -> None:
        """Forward, loss and backward; the gradients are discarded."""
        for network in self.networks:
            network.train()
        self.predict(z_t).square().mean().backward()
        for network in self.networks:
            network.zero_grad(set_to_none=True)


def unet_settings(
    size: dict[str, Any],
) -> tuple[tuple[int, ...], dict[str, Any], Callable[[str], dict[str, tuple[str, ...]]]]:
    """Heads of each level, the settings that all UNets of a size share, and the names of their blocks for a suffix such as `2D`."""
    widths, levels = size["block_out_channels"], len(size["block_out_channels"])

    def blocks(suffix: str) -> dict[str, tuple[str, ...]]:
        down = (f"CrossAttnDownBlock{suffix}",) * (levels - 1) + (f"DownBlock{suffix}",)
        up = (f"UpBlock{suffix}",) + (f"CrossAttnUpBlock{suffix}",) * (levels - 1)
        return {"down_block_types": down, "up_block_types": up}

    dim, side = size["cross_attention_dim"], size["latents"]
    common = {"block_out_channels": widths, "cross_attention_dim": dim, "layers_per_block": 2, "sample_size": side}
    return tuple(width // size["head_width"] for width in widths), common, blocks


class Inputs:
    """Random conditioning inputs of one clip at a size."""

    def __init__(self, size: dict[str, Any]) -> None:
        side, self.frames = size["latents"], size["frames"]
        self.t, self.fps = torch.tensor([500]), torch.tensor([8.0])
        self.text = torch.randn(1, TOKENS, size["cross_attention_dim"])
        self.z_ref = torch.randn(1, 4, side, side)
        self.image = repeat(self.z_ref, "b c h w -> b f c h w", f=self.frames)
        self.image_embedding = torch.randn(1, size["cross_attention_dim"])
        self.conditioning = {
            "image_tokens": torch.randn(1, *IMAGE_TOKENS),
            "pixels": torch.randn(1, 3, side * VAE_FACTOR, side * VAE_FACTOR),
            "motion_tokens": torch.randn(1, *MOTION_TOKENS),
        }


def video_unet(unet2d: UNet2DConditionModel, preset: str, *changes: str) -> VideoUNet:
    """The network of a preset in `configs/model/`, with changes as on the command line."""
    model = compose("train", [f"model={preset}", *changes]).model
    image_width = IMAGE_TOKENS[1] if model.adapter else None
    motion_width = MOTION_TOKENS[1] if model.motion_encoder else None
    return VideoUNet.from_unet2d(unet2d, model, image_width, motion_width, VAE_FACTOR)


def video_unets(unet2d: UNet2DConditionModel, inputs: Inputs, training: bool) -> dict[str, Callable[[], Contestant]]:
    """Builders of this project's presets.

    In training, what runs once per clip (ReferenceNet, the adapter, the pixel pyramid) is part of the step; in the forward its output is
    precomputed. The frozen encoders of Factorized-Dreamer are in neither.
    """
    networks = functools.cache(functools.partial(video_unet, unet2d))

    def encode(video: VideoUNet) -> Any:
        return video.encode(inputs.text, inputs.z_ref, inputs.fps, **inputs.conditioning)

    def forward(preset: str) -> Contestant:
        video = networks(preset)
        with torch.inference_mode():
            conditions = encode(video)
        return Contestant(lambda z_t: video(z_t, inputs.t, conditions), video)

    def training_step(preset: str, trainable: str) -> Contestant:
        video = networks(preset)

        def predict(z_t: Tensor) -> Tensor:
            set_trainable(video, trainable)
            return video(z_t, inputs.t, encode(video))

        return Contestant(predict, video)

    if not training:
        return {f"VideoUNet, {preset}": functools.partial(forward, preset) for preset in PRESETS}
    return {
        f"VideoUNet, {preset}, train: {trainable}": functools.partial(training_step, preset, trainable)
        for preset in PRESETS
        for trainable in ("all", "temporal")
    }


def peers(size: dict[str, Any], inputs: Inputs) -> dict[str, Callable[[], Contestant]]:
    """Builders of diffusers' video UNets."""
    heads, common, blocks = unet_settings(size)
    text, t = inputs.text, inputs.t
    text_of_frames = repeat(text, "b n d -> (b f) n d", f=inputs.frames)

    def motion() -> Contestant:
        network = UNetMotionModel(**common, **blocks("Motion"), num_attention_heads=heads)
        return Contestant(
            lambda z_t: network(rearrange(z_t, "b f c h w -> b c f h w"), t, text_of_frames).sample, network
        )

    def unet3d() -> Contestant:
        network = UNet3DConditionModel(**common, **blocks("3D"), attention_head_dim=size["head_width"])
        return Contestant(lambda z_t: network(rearrange(z_t, "b f c h w -> b c f h w"), t, text).sample, network)

    def i2vgen() -> Contestant:
        network = I2VGenXLUNet(**common, **blocks("3D"), attention_head_dim=size["head_width"])
        conditioning = {
            "fps": inputs.fps,
            "image_latents": rearrange(inputs.image, "b f c h w -> b c f h w"),
            "image_embeddings": inputs.image_embedding,
            "encoder_hidden_states": text,
        }
        return Contestant(
            lambda z_t: network(rearrange(z_t, "b f c h w -> b c f h w"), t, **conditioning).sample, network
        )

    def svd() -> Contestant:
        network = UNetSpatioTemporalConditionModel(
            **common, **blocks("SpatioTemporal"), num_attention_heads=heads, num_frames=inputs.frames
        )
        ids = torch.tensor([[7.0, 127.0, 0.02]])
        # It is conditioned on one image token instead of text.
        return Contestant(
            lambda z_t: network(torch.cat([z_t, inputs.image], dim=2), t, text[:, :1], ids).sample, network
        )

    return {
        "UNetMotionModel": motion,
        "UNet3DConditionModel": unet3d,
        "I2VGenXLUNet": i2vgen,
        "UNetSpatioTemporalConditionModel": svd,
    }


def contestants(size: dict[str, Any], training: bool, only: Sequence[str]) -> Mapping[str, Contestant]:
    """Builds the reference, and those whose name contains one of `only` (all if it is empty)."""
    torch.manual_seed(0)
    inputs = Inputs(size)
    heads, common, blocks = unet_settings(size)
    unet2d = UNet2DConditionModel(**common, **blocks("2D"), attention_head_dim=heads)
    text_of_frames = repeat(inputs.text, "b n d -> (b f) n d", f=inputs.frames)
    reference = Contestant(
        lambda z_t: unet2d(rearrange(z_t, "b f c h w -> (b f) c h w"), inputs.t, text_of_frames).sample, unet2d
    )
    builders = {**video_unets(unet2d, inputs, training), **peers(size, inputs)}
    names = [name for name in builders if not only or any(part in name for part in only)]
    return {REFERENCE: reference, **{name: builders[name]() for name in names}}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a table for each part."""
    latents = {"latents": arguments.latents} if arguments.latents else {}
    size = (QUICK if arguments.quick else FULL) | latents
    report: dict[str, Any] = {"size": size, **environment(arguments)}
    for part in arguments.parts:
        if part in COUNTS:
            report["counted_size"] = (QUICK if arguments.quick else STABLE_DIFFUSION) | latents
            report[part] = COUNTS[part](report["counted_size"], arguments.only)
        else:
            report[part] = measure_seconds(part, size, arguments)
        columns = {name: unit for name, unit in UNITS.items() if name in report[part][REFERENCE]}
        print(f"\n{part:<56}{'ratio':>8}" + "".join(f"{title:>14}" for title, _ in columns.values()))
        for name, row in sorted(report[part].items(), key=lambda item: item[1]["ratio"]):
            values = "".join(
                f"{row[column] / unit:>14,.{0 if unit == 1 and column != 'seconds' else 3}f}"
                for column, (_, unit) in columns.items()
            )
            print(f"{name:<56}{row['ratio']:>8.2f}{values}")
    return report


def measure_seconds(part: str, size: dict[str, Any], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of the forward or of the training step of every network."""
    z_t = torch.randn(1, size["frames"], 4, size["latents"], size["latents"])
    networks = contestants(size, part == "training", arguments.only)
    step = Contestant.training_step if part == "training" else Contestant.forward
    actions = {name: functools.partial(step, contestant, z_t) for name, contestant in networks.items()}
    rows = compare_seconds(actions, arguments.rounds, CLOCKS[arguments.clock], part, REFERENCE)
    return {name: row | {"parameters": _parameters(networks[name])} for name, row in rows.items()}


def count_flops(size: dict[str, Any], only: Sequence[str]) -> dict[str, dict[str, float]]:
    """Floating-point operations of the forward of every network, counted without computing it; a multiply-add is two."""
    with torch.device("meta"):
        z_t = torch.randn(1, size["frames"], 4, size["latents"], size["latents"])
        networks, flops = contestants(size, False, only), {}
        for name, contestant in networks.items():
            for network in contestant.networks:
                network.to("meta")  # some parameters of diffusers do not follow the device of the context
            with FlopCounterMode(display=False) as counter:
                contestant.forward(z_t)
            flops[name] = float(counter.get_total_flops())
    return {name: _row(networks, name, "flops", flops) for name in networks}


def count_launches(size: dict[str, Any], only: Sequence[str]) -> dict[str, dict[str, float]]:
    """Launches and bytes of a training step of every network (`LaunchCounter`), float32, counted without computing it."""
    with FakeTensorMode():
        z_t = torch.randn(1, size["frames"], 4, size["latents"], size["latents"])
        networks, launches, traffic = contestants(size, True, only), {}, {}
        for name, contestant in networks.items():
            with LaunchCounter() as counter:
                contestant.training_step(z_t)
            launches[name], traffic[name] = counter.launches, counter.bytes
    return {name: _row(networks, name, "launches", launches) | {"bytes": traffic[name]} for name in networks}


COUNTS = {"flops": count_flops, "launches": count_launches}


def _row(networks: Mapping[str, Contestant], name: str, figure: str, values: Mapping[str, float]) -> dict[str, float]:
    parameters = _parameters(networks[name])
    return {figure: values[name], "ratio": values[name] / values[REFERENCE], "parameters": parameters}


def _parameters(contestant: Contestant) -> int:
    return sum(p.numel() for network in contestant.networks for p in network.parameters())


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and runs the benchmark."""
    parser = make_parser(__doc__)
    add_timing(parser)
    parser.add_argument("--parts", nargs="+", choices=("forward", "training", *COUNTS), default=("forward", "training"))
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="run networks with these words in their names"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny networks: shows that it runs, measures nothing of use"
    )
    return run(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
