"""Cost of a clip's whole denoising loop with the authors' AppearNet and with ours, as a ratio to the network without either.

OMP_NUM_THREADS=1 python -m benchmarks.sampling --clock cpu
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from benchmarks.denoiser import FULL, QUICK, TOKENS, unet_settings, video_unet
from benchmarks.reporting import CLOCKS, add_timing, environment, make_parser, median_seconds, run
from microcinema.diffusion.schedule import make_sampler

TINY: dict[str, Any] = QUICK | {"frames": 16, "latents": 16}
BASELINE = "microcinema_once without ReferenceNet"
NETWORKS = {
    BASELINE: ("microcinema_once", "model.appearance=null"),
    "microcinema_once": ("microcinema_once",),
    "microcinema_once, fusion=scale_shift": ("microcinema_once", "model.appearance.fusion=scale_shift"),
    "microcinema without AppearNet": ("microcinema", "model.appearance=null"),
    "microcinema": ("microcinema",),
}
"""Preset of each network, and what is changed of it."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a table of ratios and seconds."""
    size = (FULL if arguments.full else TINY) | ({"latents": arguments.latents} if arguments.latents else {})
    torch.manual_seed(0)
    heads, common, blocks = unet_settings(size)
    unet2d = UNet2DConditionModel(**common, **blocks("2D"), attention_head_dim=heads)
    z_ref = torch.randn(1, 4, size["latents"], size["latents"])
    text, fps = torch.randn(1, TOKENS, size["cross_attention_dim"]), torch.tensor([8.0])
    noise = torch.randn(1, size["frames"], *z_ref.shape[1:])

    def loop(preset: str, *changes: str) -> Callable[[], None]:
        video, scheduler = video_unet(unet2d, preset, *changes).eval(), make_sampler(DDPMScheduler())

        def sample() -> None:
            with torch.inference_mode():
                scheduler.set_timesteps(arguments.steps)
                conditions, z = video.encode(text, z_ref, fps), noise
                for t in scheduler.timesteps:
                    z = scheduler.step(video(z, t, conditions), t, z).prev_sample

        return sample

    loops = {name: loop(*preset) for name, preset in NETWORKS.items()}
    seconds = median_seconds(loops, arguments.rounds, CLOCKS[arguments.clock], "sampling")
    rows = {name: {"seconds": value, "ratio": value / seconds[BASELINE]} for name, value in seconds.items()}
    print(f"\n{f'sampling, {arguments.steps} steps':<40}{'ratio':>8}{'seconds':>10}")
    for name, row in rows.items():
        print(f"{name:<40}{row['ratio']:>8.3f}{row['seconds']:>10.3f}")
    return {"size": size, "steps": arguments.steps, **environment(arguments), "sampling": rows}


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and runs the benchmark."""
    parser = make_parser(__doc__)
    add_timing(parser)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--full", action="store_true", help="half of Stable Diffusion's width instead of a tiny one")
    return run(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
