"""Computes what training on WebVid-10M takes, and writes the tables of docs/scale.md: `python -m benchmarks.capacity`.

Everything comes from the figures of docs/scale.json, of which each says whether it was published, counted, measured or assumed. Change an
assumption there and run this again. `--count` and `--measure` renew what can be counted and measured on this machine.
"""

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from microcinema.config.compose import compose
from microcinema.data.clips import ClipDataset
from microcinema.data.video_writer import write_video
from microcinema.models.vae import encode_pixels
from microcinema.profiling import memory_estimate
from microcinema.training.mfu import ModelFlops
from microcinema.utils.files import atomic_path

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURES = DOCS / "scale.md", DOCS / "scale.json"
SIZES = (8, 64, 256)  # GPUs
SOURCES = ("raw clips", "cached latents")
NODE = 8  # GPUs
BEGIN, END = "<!-- computed by benchmarks/capacity.py -->\n", "<!-- end of what is computed -->\n"
WEBVID = (336, 596)  # height and width of its videos, pixels
FRAMES, FPS, RESOLUTION = 16, 8.0, 256

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """A run on so many GPUs, from one source, at one utilisation.

    Attributes:
        limits: clips a second that each part of the system could bear alone.
        bottleneck: the part that bears least.
        rate: clips a second.
        step: seconds of a step, of which `communication` are the averaging of gradients.
        cores: processor cores that decode as fast as the GPUs compute.
        reading: bytes a second from the store, all GPUs together.
    """

    limits: dict[str, float]
    step: float
    communication: float
    cores: float
    reading: float

    @property
    def bottleneck(self) -> str:
        slowest = min(self.limits, key=self.limits.__getitem__)
        return "gradients" if slowest == "GPUs" and self.communication > self.step / 2 else slowest

    @property
    def rate(self) -> float:
        return min(self.limits.values())


def bytes_of_clip(figures: Figures, source: str) -> float:
    """What is stored, and read, of a clip."""
    if source == "raw clips":
        return figures["hours_of_video"] * 3600 / figures["clips"] * figures["bits_per_second"] / 8
    return figures["latent_bytes"] + figures["text_token_bytes"] + figures["sample_overhead_bytes"]


def flops_of_clip(figures: Figures, source: str) -> float:
    """Operations of a clip: of the step alone, or with the frozen encoders before it."""
    encoders = figures["vae_flops"] + figures["text_encoder_flops"]
    return figures["training_flops"] + (encoders if source == "raw clips" else 0.0)


def plan(figures: Figures, gpus: int, source: str, utilisation: float) -> Plan:
    """What a run of one global batch a step, whatever the number of GPUs, comes to.

    Gradients are averaged in rings, in which 2 (n - 1) / n times their bytes leave each GPU or, in rings over nodes, each node; in the
    worst case nothing hides it.
    """
    compute = gpus * utilisation * figures["peak_flops"] / flops_of_clip(figures, source)
    link = figures["nvlink_bytes_per_second"] if gpus <= NODE else figures["node_bytes_per_second"]
    communication = 2 * (gpus - 1) / gpus * figures["gradient_bytes"] / link
    step = figures["clips_per_step"] / compute + communication
    size = bytes_of_clip(figures, source)
    limits = {"GPUs": figures["clips_per_step"] / step, "store": figures["store_bytes_per_second"] / size}
    if source == "raw clips":
        limits["decoding"] = gpus * figures["cores_per_gpu"] / figures["decoding_seconds"]
    cores = limits["GPUs"] * figures["decoding_seconds"] if source == "raw clips" else 0.0
    return Plan(limits, step, communication, cores, min(limits.values()) * size)


def render(figures: Figures, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The computed part of the page, as Markdown."""
    low, high = figures["utilisation_low"], figures["utilisation_high"]
    clips, steps = figures["clips"], figures["steps"]
    lines = ["### What a clip is", "", "| | " + " | ".join(SOURCES) + " |", "| --- | ---: | ---: |"]

    def row(title: str, cells: list[str]) -> None:
        lines.append(f"| {title} | {' | '.join(cells)} |")

    sizes = {source: bytes_of_clip(figures, source) for source in SOURCES}
    row("stored, KB a clip", [f"{sizes[source] / 1e3:,.0f}" for source in SOURCES])
    row(
        f"stored, TB for {clips / 1e6:.1f} million clips",
        [f"{sizes[source] * clips / 1e12:,.1f}" for source in SOURCES],
    )
    month = figures["store_dollars_per_tb_month"]
    row("storing it, $ a month", [f"{sizes[source] * clips / 1e12 * month:,.0f}" for source in SOURCES])
    row("operations, TFLOP a clip", [f"{flops_of_clip(figures, source) / 1e12:.1f}" for source in SOURCES])
    row("decoding, core-seconds a clip", [f"{figures['decoding_seconds']:.2f}", "none"])
    encoding = clips * (figures["vae_flops"] + figures["text_encoder_flops"]) / figures["peak_flops"] / 3600
    lines += ["", "### Making the latents, once", ""]
    lines += ["| | |", "| --- | ---: |"]
    row("GPU hours", [_range(encoding / high, encoding / low)])
    row("core hours of decoding", [f"{clips * figures['decoding_seconds'] / 3600:,.0f}"])
    for title, work in (("One pass over the clips", clips), (f"{steps:,.0f} steps", steps * figures["clips_per_step"])):
        lines += ["", f"### {title}", ""]
        lines += ["| GPUs | from | clips/s | bottleneck | hours | GPU hours | $ |"]
        lines += ["| ---: | --- | ---: | --- | ---: | ---: | ---: |"]
        for gpus in SIZES:
            for source in SOURCES:
                fast, slow = (plan(figures, gpus, source, each) for each in (high, low))
                hours = [work / each.rate / 3600 for each in (fast, slow)]
                named = list(dict.fromkeys([slow.bottleneck, fast.bottleneck]))
                row(
                    f"{gpus} | {source}",
                    [
                        _range(slow.rate, fast.rate),
                        ", ".join(named),
                        _range(*hours),
                        _range(*(gpus * each for each in hours)),
                        _range(*(gpus * each * figures["dollars_per_gpu_hour"] for each in hours)),
                    ],
                )
    lines += ["", "### What the GPUs ask of the rest", ""]
    lines += [
        "| GPUs | from | decoding cores | of those there | reading, GB/s | averaging gradients, share of the step |"
    ]
    lines += ["| ---: | --- | ---: | ---: | ---: | ---: |"]
    for gpus in SIZES:
        for source in SOURCES:
            slow, fast = (plan(figures, gpus, source, each) for each in (low, high))
            there = gpus * figures["cores_per_gpu"]
            row(
                f"{gpus} | {source}",
                [
                    _range(slow.cores, fast.cores) if fast.cores else "none",
                    _range(100 * slow.cores / there, 100 * fast.cores / there) + "%" if fast.cores else "none",
                    _range(*(each.limits["GPUs"] * sizes[source] / 1e9 for each in (slow, fast))),
                    _range(*(100 * each.communication / each.step for each in (slow, fast))) + "%",
                ],
            )
    lines += ["", "### Where the figures come from", "", "| figure | value | | source |", "| --- | ---: | --- | --- |"]
    for name, entry in entries.items():
        value = f"{entry['value']:,.0f}" if 1e3 <= entry["value"] < 1e6 else f"{entry['value']:.4g}"
        row(name.replace("_", " "), [f"{value} {entry['unit']}".strip(), entry["kind"], entry["source"]])
    return "\n".join(lines) + "\n"


def read_figures() -> tuple[dict[str, float], dict[str, Any]]:
    """Values by name, and the entries that say where each comes from."""
    entries = json.loads(FIGURES.read_text(encoding="utf-8"))
    return {name: entry["value"] for name, entry in entries.items()}, entries


def page(text: str, computed: str) -> str:
    """The page with its computed part renewed."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{computed}{END}{rest.partition(END)[2]}"


def count(composed: Any) -> dict[str, float]:
    """Operations, trained parameters and sizes of one clip, of networks without data: shapes are enough.

    Args:
        composed: config of `train`.
    """
    settings = replace(composed, train_batch_size=1, gradient_accumulation_steps=1, mixed_precision="bf16")
    pipeline = memory_estimate.empty_pipeline(composed)
    with FlopCounterMode(display=False) as of_vae:
        video = pipeline.unet.conv_in.weight.detach().new_zeros(1, FRAMES, 3, RESOLUTION, RESOLUTION)
        latents = encode_pixels(pipeline.vae, video)
    with FlopCounterMode(display=False) as of_text:
        text = pipeline.encode_text([memory_estimate.PROMPT])
    with ModelFlops() as flops:
        estimate = memory_estimate.training_memory(pipeline, settings, latents=True, device="cuda")
    return {
        "training_flops": flops.total,
        "vae_flops": of_vae.get_total_flops(),
        "text_encoder_flops": of_text.get_total_flops(),
        "gradient_bytes": estimate.gradients // (2 if composed.ddp.comm_hook else 1),
        "latent_bytes": 2 * latents.numel(),
        "text_token_bytes": 2 * text.numel(),
    }


def measure_decoding(seconds: float, clips: int, bits_per_second: float) -> dict[str, float]:
    """Processor seconds in which one core makes a training clip of a video of WebVid's size.

    Args:
        seconds: of video.
        clips: random parts of it.
        bits_per_second: x264's quality is lowered to about this rate, on which decoding depends.

    Returns:
        `decoding_seconds`, and `bits`, the rate of the file that was decoded.
    """
    height, width = WEBVID
    rng = np.random.default_rng(0)
    frames = int(seconds * 25)
    coarse = rng.integers(0, 256, (height // 12, (width + 3 * frames) // 12 + 2, 3), np.uint8)
    wide = cv2.resize(coarse, None, fx=12, fy=12, interpolation=cv2.INTER_CUBIC)  # what a camera pans over

    def frame(number: int) -> np.ndarray:
        grain = rng.normal(0, 8, (height, width, 1))  # of its sensor
        return (wide[:height, 3 * number : 3 * number + width] + grain).clip(0, 255).astype(np.uint8)

    video = np.stack([frame(number) for number in range(frames)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "videos" / "0.mp4"
        path.parent.mkdir()
        for crf in range(30, 14, -1):
            write_video(path, video[:50], 25, crf)
            if 8 * path.stat().st_size / min(2.0, seconds) >= bits_per_second:
                break
        write_video(path, video, 25, crf)
        (Path(folder) / "list.csv").write_text("videoid,name\n0,a wall\n")
        data = ClipDataset(f"{folder}/list.csv", folder, FRAMES, FPS, RESOLUTION, clip_position="random", timeout=None)
        taken = []
        for epoch in range(clips + 1):
            data.set_epoch(epoch)
            began = time.process_time()
            data[0]
            taken.append(time.process_time() - began)
        bits = 8 * path.stat().st_size / seconds
    return {"decoding_seconds": statistics.mean(taken[1:]), "bits": bits}


def renew(entries: dict[str, Any], values: Mapping[str, float]) -> None:
    """Puts newly counted or measured values into the figures."""
    for name, value in values.items():
        entries[name]["value"] = value


def main(argv: list[str] | None = None) -> None:
    """Renews figures if asked to, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", metavar="BASE", help="count operations and sizes again, with this base's settings")
    parser.add_argument("--measure", action="store_true", help="measure decoding again, on one core of this machine")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    _, entries = read_figures()
    if arguments.count:
        overrides = [
            f"base.pretrained_model_name_or_path={arguments.count}",
            f"resolution={RESOLUTION}",
            "ddp.comm_hook=bf16",
        ]
        renew(entries, count(compose("train", [*overrides, f"num_frames={FRAMES}"])))
    if arguments.measure:
        found = measure_decoding(18.0, 30, entries["bits_per_second"]["value"])
        renew(entries, {"decoding_seconds": round(found["decoding_seconds"], 4)})
        entries["decoding_seconds"]["source"] = (
            f"processor time of one core ({_processor()}), PyAV, mean of 30 random parts of an H.264 file of 18 s, "
            f"{WEBVID[1]}x{WEBVID[0]}, 25 fps, {found['bits'] / 1e6:.1f} Mbit/s: `python -m benchmarks.capacity --measure`"
        )
    with atomic_path(FIGURES) as temporary:
        temporary.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    figures, entries = read_figures()
    with atomic_path(PAGE) as temporary:
        temporary.write_text(page(PAGE.read_text(encoding="utf-8"), render(figures, entries)), encoding="utf-8")


def _range(low: float, high: float) -> str:
    """Both ends with three digits, the smaller first; one where they say the same."""
    ends = list(dict.fromkeys(_digits(each) for each in sorted((low, high))))
    return " to ".join(ends)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
