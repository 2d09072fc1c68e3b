"""Measures what the video model costs: `python scripts/benchmark.py denoiser` prints the table, `--help` the options.

The denoiser stands beside the 2D UNet that it is built from, run on every frame, and beside diffusers' video UNets, all
at equal widths, head widths and depths, each with the inputs that it takes. A round runs every contestant once; the
figure is the ratio of medians to the per-frame 2D UNet, which other load on the machine hardly moves. On a crowded
machine `--clock cpu` counts the processor time of this process instead of the time that passes. A training step is
forward, mean squared error, backward.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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
from tqdm import tqdm

from microcinema.files import atomic_path
from microcinema.models import ConditionEncoder, VideoUNet, set_trainable

REFERENCE = "2D UNet per frame"
FULL: dict[str, Any] = {
    "block_out_channels": (160, 320, 640, 640),
    "head_width": 32,
    "cross_attention_dim": 768,
    "frames": 16,
    "latents": 32,
}
QUICK: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "head_width": 16,
    "cross_attention_dim": 32,
    "frames": 3,
    "latents": 8,
}
TOKENS = 77


class Contestant:
    """A network that takes its own kind of input, seen as a function of noisy latents `b f c h w`.

    Args:
        run: the forward.
        nets: the networks whose gradients a training step computes (those that require one).
    """

    def __init__(self, run: Callable[[Tensor], Tensor], *nets: nn.Module):
        self.run = run
        self.nets = nets

    def forward(self, z_t: Tensor) -> None:
        """One prediction without gradients."""
        for net in self.nets:
            net.eval()
        with torch.inference_mode():
            self.run(z_t)

    def training_step(self, z_t: Tensor) -> None:
        """Forward, loss and backward; the gradients are thrown away."""
        for net in self.nets:
            net.train()
        self.run(z_t).square().mean().backward()
        for net in self.nets:
            net.zero_grad(set_to_none=True)


def contestants(size: dict[str, Any], fusion: str, training: bool, only: Sequence[str]) -> dict[str, Contestant]:
    """Builds those whose name contains one of `only` (all without it), and the reference.

    In training AppearanceNet runs within the step, in the forward its features are given.
    """
    torch.manual_seed(0)
    widths, dim, side, f = size["block_out_channels"], size["cross_attention_dim"], size["latents"], size["frames"]
    levels = len(widths)
    heads = tuple(width // size["head_width"] for width in widths)

    def blocks(suffix: str) -> dict[str, tuple[str, ...]]:
        down = (f"CrossAttnDownBlock{suffix}",) * (levels - 1) + (f"DownBlock{suffix}",)
        up = (f"UpBlock{suffix}",) + (f"CrossAttnUpBlock{suffix}",) * (levels - 1)
        return {"down_block_types": down, "up_block_types": up}

    common = {"block_out_channels": widths, "cross_attention_dim": dim, "layers_per_block": 2, "sample_size": side}
    text, t, fps = torch.randn(1, TOKENS, dim), torch.tensor([500]), torch.tensor([8.0])
    text_of_frames = repeat(text, "b n d -> (b f) n d", f=f)
    z_ref = torch.randn(1, 4, side, side)
    image = repeat(z_ref, "b c h w -> b f c h w", f=f)
    unet2d = UNet2DConditionModel(**common, **blocks("2D"), attention_head_dim=heads)

    def per_frame() -> Contestant:
        return Contestant(
            lambda z_t: unet2d(rearrange(z_t, "b f c h w -> (b f) c h w"), t, text_of_frames).sample, unet2d
        )

    @functools.cache
    def nets() -> tuple[VideoUNet, ConditionEncoder]:
        options = {"fusion": fusion, "inject": "both"}
        return VideoUNet.from_unet2d(unet2d, **options), ConditionEncoder.from_unet2d(unet2d, **options)

    def ours() -> Contestant:
        video, encoder = nets()
        with torch.inference_mode():
            conditions = encoder(text, z_ref, fps)
        return Contestant(lambda z_t: video(z_t, t, conditions), video)

    def ours_in_training(train: str) -> Contestant:
        video, encoder = nets()

        def run(z_t: Tensor) -> Tensor:
            set_trainable(video, encoder, train)
            return video(z_t, t, encoder(text, z_ref, fps))

        return Contestant(run, video, encoder)

    def motion() -> Contestant:
        net = UNetMotionModel(**common, **blocks("Motion"), num_attention_heads=heads)
        return Contestant(lambda z_t: net(rearrange(z_t, "b f c h w -> b c f h w"), t, text_of_frames).sample, net)

    def unet3d() -> Contestant:
        net = UNet3DConditionModel(**common, **blocks("3D"), attention_head_dim=size["head_width"])
        return Contestant(lambda z_t: net(rearrange(z_t, "b f c h w -> b c f h w"), t, text).sample, net)

    def i2vgen() -> Contestant:
        net = I2VGenXLUNet(**common, **blocks("3D"), attention_head_dim=size["head_width"])
        given = {
            "fps": fps,
            "image_latents": rearrange(image, "b f c h w -> b c f h w"),
            "image_embeddings": torch.randn(1, dim),
            "encoder_hidden_states": text,
        }
        return Contestant(lambda z_t: net(rearrange(z_t, "b f c h w -> b c f h w"), t, **given).sample, net)

    def svd() -> Contestant:
        net = UNetSpatioTemporalConditionModel(
            **common, **blocks("SpatioTemporal"), num_attention_heads=heads, num_frames=f
        )
        ids = torch.tensor([[7.0, 127.0, 0.02]])
        # It is conditioned on one image token instead of text.
        return Contestant(lambda z_t: net(torch.cat([z_t, image], dim=2), t, text[:, :1], ids).sample, net)

    video_unets: dict[str, Callable[[], Contestant]] = {"VideoUNet": ours}
    if training:
        video_unets = {
            f"VideoUNet, train: {train}": functools.partial(ours_in_training, train) for train in ("all", "temporal")
        }
    peers = {
        "UNetMotionModel": motion,
        "UNet3DConditionModel": unet3d,
        "I2VGenXLUNet": i2vgen,
        "UNetSpatioTemporalConditionModel": svd,
    }
    builders = {REFERENCE: per_frame, **video_unets, **peers}
    return {
        name: build()
        for name, build in builders.items()
        if name == REFERENCE or not only or any(part in name for part in only)
    }


def measure(
    actions: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float], what: str
) -> dict[str, float]:
    """Median seconds of each action over interleaved rounds, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    with tqdm(total=(rounds + 1) * len(actions), desc=what) as bar:
        for _ in range(rounds + 1):
            for name, action in actions.items():
                start = clock()
                action()
                seconds[name].append(clock() - start)
                bar.update()
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def denoiser(arguments: argparse.Namespace) -> None:
    """Prints forward and training ratios to the per-frame 2D UNet."""
    size = (QUICK if arguments.quick else FULL) | ({"latents": arguments.latents} if arguments.latents else {})
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    z_t = torch.randn(1, size["frames"], 4, size["latents"], size["latents"])
    report: dict[str, Any] = {
        "size": size,
        "fusion": arguments.fusion,
        "clock": arguments.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for part in arguments.parts:
        runs = contestants(size, arguments.fusion, part == "training", arguments.only)
        parameters = {name: sum(p.numel() for net in c.nets for p in net.parameters()) for name, c in runs.items()}
        step = Contestant.training_step if part == "training" else Contestant.forward
        actions = {name: (lambda c=c, step=step: step(c, z_t)) for name, c in runs.items()}
        seconds = measure(actions, arguments.rounds, clock, part)
        ratios = {name: value / seconds[REFERENCE] for name, value in seconds.items()}
        report[part] = {
            name: {"seconds": seconds[name], "ratio": ratios[name], "parameters": parameters[name]} for name in runs
        }
        print(f"\n{part:<34}{'ratio':>8}{'seconds':>10}{'M parameters':>14}")
        for name in sorted(runs, key=ratios.__getitem__):
            print(f"{name:<34}{ratios[name]:>8.2f}{seconds[name]:>10.3f}{parameters[name] / 1e6:>14.1f}")
        del runs, actions
    if arguments.json:
        with atomic_path(arguments.json) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(description="Measure what the video model costs.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "denoiser", help="VideoUNet beside other video UNets"
    )
    command.add_argument("--parts", nargs="+", choices=("forward", "training"), default=("forward", "training"))
    command.add_argument("--rounds", type=int, default=5, help="rounds that count")
    command.add_argument("--fusion", choices=("add", "spade"), default="add")
    command.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what to count")
    command.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="run these and the reference (parts of names)"
    )
    command.add_argument("--latents", type=int, help="height and width of the latents")
    command.add_argument(
        "--quick", action="store_true", help="tiny widths: shows that it runs, measures nothing of use"
    )
    command.add_argument("--json", type=Path, help="write the figures to this file too")
    denoiser(parser.parse_args(argv))


if __name__ == "__main__":
    main()
