"""Sampling: what the networks cost, and what settings of `sample` are worth.

Without a command: cost of a clip's whole denoising loop with the authors' AppearNet and with ours, as a ratio to the network without either.
OMP_NUM_THREADS=1 python -m benchmarks.sampling --clock cpu

`settings`: time, object, motion and key frame of an embedded model's own protocol for each of several settings, all in one run.
OMP_NUM_THREADS=1 python -m benchmarks.sampling settings --clock cpu --minutes 35 --figure docs/sampling.png
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from benchmarks.denoiser import FULL, QUICK, TOKENS, unet_settings, video_unet
from benchmarks.reporting import CLOCKS, add_timing, compare_seconds, environment, make_parser, run
from microcinema.config.compose import compose
from microcinema.config.sampling import SamplingSettings
from microcinema.diffusion.schedule import make_sampler
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.sample_folder import Sample, to_uint8
from microcinema.pipelines.text_to_video import TextToVideoPipeline, animate, keyframe_arguments, make_item_keyframe
from microcinema.sprites.judge import SpriteJudge, judge_clips
from microcinema.sprites.metrics import measure_all
from microcinema.sprites.protocol import SpritesProtocol, Task

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
_SHORT = "num_inference_steps=10 keyframe.num_inference_steps="
SETTINGS = (
    "preset=balanced",
    "preset=fast",
    f"{_SHORT}10",
    f"{_SHORT}25",
    f"{_SHORT}15 scheduler=DPMSolverMultistepScheduler",
    f"{_SHORT}15 scheduler=UniPCMultistepScheduler",
    "guidance_interval=[0,0.6]",
    "guidance_interval=[0.2,1]",
    "guidance_reuse=2",
    "guidance_rescale=0.7",
    "apg_eta=0 apg_momentum=-0.5",
    "cache_interval=2",
    "cache_interval=3",
)
"""Settings that are measured by default, beside `preset=quality`."""


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
    rows = compare_seconds(loops, arguments.rounds, CLOCKS[arguments.clock], "sampling", BASELINE)
    print(f"\n{f'sampling, {arguments.steps} steps':<40}{'ratio':>8}{'seconds':>10}")
    for name, row in rows.items():
        print(f"{name:<40}{row['ratio']:>8.3f}{row['seconds']:>10.3f}")
    return {"size": size, "steps": arguments.steps, **environment(arguments), "sampling": rows}


def _key(task: Task) -> tuple[int, int]:
    return task.index, task.numbers[0]


class Setting:
    """Clips of the protocol made with settings of `sample`, such as `num_inference_steps=10 cache_interval=2`, and their time."""

    def __init__(self, overrides: str, both: TextToVideoPipeline):
        config = compose("sample", overrides.split())
        own = {name: getattr(config, name) for name in SamplingSettings.__dataclass_fields__}
        self.both, self.keyframe, self.resolved = both, config.keyframe, both.video.resolve(SamplingSettings(**own))
        self.samples: dict[str, Sample] = {}
        self.seconds = 0.0

    def make(self, items: Sequence[PromptItem], clock: Callable[[], float]) -> None:
        """Draws the key frames, and animates them in one batch."""
        start, settings, both = clock(), self.resolved, self.both
        images = []
        for item in items:
            arguments = keyframe_arguments(both.keyframe, item, both.video.config, settings, self.keyframe)
            images.append(make_item_keyframe(item, both.keyframe, settings.height, settings.width, **arguments).image)
        clips = animate(both.video, items, images, settings, output_type="np").frames
        self.seconds += clock() - start
        for item, clip, image in zip(items, clips, images, strict=True):
            self.samples[item.id] = Sample(to_uint8(clip), np.array(image))


def measure_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a table, whose first row the others are compared with: seconds a clip, and each measure with its 95 % interval."""
    both = TextToVideoPipeline.from_pretrained(arguments.pipeline)
    both.set_progress_bar_config(disable=True)
    judge, clock, end = (
        SpriteJudge.load("sprites-classifier"),
        CLOCKS[arguments.clock],
        time.monotonic() + 60 * arguments.minutes,
    )
    protocol = SpritesProtocol(*[arguments.prompts] * 3)
    index = both.video.windows(both.video.resolve(SamplingSettings())).keyframe_index(both.video.keyframe_position)
    tasks = sorted(protocol.tasks(), key=_key)
    settings = {name: Setting(name, both) for name in dict.fromkeys(["preset=quality", *arguments.settings])}
    done = 0
    while done < len(tasks) and (not done or time.monotonic() < end):  # all settings of one batch, then the next batch
        batch = tasks[done : done + arguments.batch_size]
        real = [protocol.render(t.sprite).frames[index] if t.part == "image" else None for t in batch]
        items = [t.item(both.video.uses_motion_caption, image) for t, image in zip(batch, real, strict=True)]
        for setting in settings.values():
            setting.make(items, clock)
        done += len(batch)
        print(f"{done} clips", file=sys.stderr)
    rows: dict[str, dict[str, Any]] = {}
    for name, setting in settings.items():
        verdicts = judge_clips(tasks[:done], lambda t: setting.samples[t.name], protocol, judge, "", index)  # noqa: B023
        measures = measure_all(verdicts)
        rows[name] = {"seconds": setting.seconds / done, **{key: measures[key] for key in ("object", "motion", "psnr")}}
    print(settings_table(rows))
    if arguments.figure:
        draw(rows, arguments.figure)
    return {"pipeline": arguments.pipeline, "clips": done, **environment(arguments), "settings": rows}


def settings_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown. A value is in bold if it is within the first row's interval, a PSNR if it is at most 0.5 dB lower."""
    first = next(iter(rows.values()))
    lines = [
        "| settings | seconds | ratio | object | motion | key frame, dB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        cells = [f"{row['seconds']:.2f}", f"{row['seconds'] / first['seconds']:.2f}"]
        for key, unit in (("object", 100), ("motion", 100), ("psnr", 1)):
            value, low, high = (unit * row[key][end] for end in ("value", "low", "high"))
            least = first[key]["low"] if unit == 100 else first[key]["value"] - 0.5
            mark = "**" if row[key]["value"] >= least else ""
            cells.append(f"{mark}{value:.1f}{mark} [{low:.1f}, {high:.1f}]")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A figure: each measure with its interval over the seconds of a clip."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    titles = (("object", "object as asked", 100), ("motion", "motion as asked", 100), ("psnr", "key frame, dB", 1))
    for axes, (key, title, unit) in zip(figure.subplots(1, 3), titles, strict=True):
        for name, row in rows.items():
            value, low, high = (unit * row[key][end] for end in ("value", "low", "high"))
            axes.errorbar(row["seconds"], value, [[value - low], [high - value]], fmt="o", capsize=2, label=name)
        axes.set(title=title, xlabel="seconds a clip", xlim=(0, None))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and runs the benchmark."""
    parser = make_parser(__doc__)
    add_timing(parser)
    parser.set_defaults(measure=measure)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--full", action="store_true", help="half of Stable Diffusion's width instead of a tiny one")
    command = parser.add_subparsers().add_parser("settings", help=measure_settings.__doc__)
    command.set_defaults(measure=measure_settings)
    command.add_argument("settings", nargs="*", default=SETTINGS, help="overrides of `sample`, one text for each row")
    command.add_argument("--pipeline", default="sprites-microcinema", help="an embedded or saved pipeline")
    command.add_argument("--prompts", type=int, default=60, help="clips of each part of the protocol")
    command.add_argument("--batch-size", type=int, default=6, help="clips made at once")
    command.add_argument("--minutes", type=float, default=35.0, help="after which no further batch begins")
    command.add_argument("--clock", choices=CLOCKS, default="cpu", help="elapsed time, or that of the processor")
    command.add_argument("--figure", type=Path, help="write a figure to this file")
    command.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args(argv)
    return run(arguments.measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
