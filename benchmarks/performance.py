"""All benchmarks of speed one after the other, and `docs/performance.md` from what they found: `python -m benchmarks.performance`.

About an hour; started again it goes on after the last benchmark that ended. Use a machine that does nothing else.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.denoiser import REFERENCE
from benchmarks.reporting import make_parser, run
from benchmarks.sampling import settings_table
from microcinema.sprites.dataset import write_dataset
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path, make_folder

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "counts": "denoiser --parts flops launches",
    "networks": "denoiser --clock cpu --parts forward training --rounds 3 --latents 16",
    "loops": "sampling --clock cpu --rounds 5",
    "decoding": "decoding",
    "loader": "loader --size 128 224 --clips 6000",
    "step": "train_step train_batch_size=2 data.root={work}/sprites --steps 5 --clock cpu",
    "startup": "startup",
    "settings": "sampling settings --minutes 40 --figure {out}/sampling.png preset=balanced preset=fast"
    " 'num_inference_steps=5 keyframe.num_inference_steps=25' guidance_interval=[0.2,1] cache_interval=2",
}
QUICK = {
    "counts": "denoiser --quick --parts flops launches",
    "networks": "denoiser --quick --clock cpu --rounds 1",
    "loops": "sampling --clock cpu --rounds 1 --steps 1 --latents 4",
    "decoding": "decoding --rounds 1",
    "loader": "loader --size 48 64 --clips 40 --warm 20 --num-workers 1",
    "step": "train_step train_batch_size=1 data.root={work}/sprites --steps 1 --clock cpu",
    "startup": "startup --rounds 1",
    "settings": "sampling settings --prompts 1 --batch-size 1 --minutes 0 num_inference_steps=1 --figure {out}/sampling.png",
}
"""Shows that the page is written, and measures nothing of use."""
Report = dict[str, Any]


def measure(arguments: argparse.Namespace) -> Report:
    """Runs what has not ended yet, and writes the page and its figure.

    Raises:
        UserError: a benchmark failed; its message stands above.
    """
    work, out = make_folder(arguments.work), make_folder(arguments.out)
    commands = QUICK if arguments.quick else COMMANDS
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if not (work / "sprites").is_dir():
        write_dataset(work / "sprites", 100)
    for name, template in commands.items():
        path, line = work / f"{name}.json", template.format(out=out, work=work)
        if not path.is_file():
            print(f"{name}: python -m benchmarks.{line}", file=sys.stderr)
            module, *options = shlex.split(line)
            command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--json", str(path)]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
            if found.returncode:
                raise UserError(f"benchmarks.{line} ended with exit status {found.returncode}; run it alone")
            (work / f"{name}.txt").write_text(found.stdout, encoding="utf-8")
    reports = {name: json.loads((work / f"{name}.json").read_text(encoding="utf-8")) for name in commands}
    printed = {name: (work / f"{name}.txt").read_text(encoding="utf-8").strip() + "\n" for name in commands}
    folders = {"work": "runs/performance", "out": "docs"}
    shown = {
        name: f"OMP_NUM_THREADS=1 python -m benchmarks.{line.format(**folders)}" for name, line in commands.items()
    }
    page = render(reports, printed, shown, arguments.remark)
    with atomic_path(out / "performance.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    draw(network_rows(reports), out / "performance.png")
    return reports


def network_rows(reports: Mapping[str, Report]) -> list[Report]:
    """The networks by their operations: name, and rows of the benchmarks; `temporal` is None for networks of others."""
    flops, times = reports["counts"]["flops"], reports["networks"]
    rows = []
    for name in sorted(flops, key=lambda name: flops[name]["ratio"]):
        training = times["training"]
        rows.append(
            {
                "name": display_name(name),
                "flops": flops[name],
                "forward": times["forward"][name],
                "training": training.get(f"{name}, train: all", training.get(name)),
                "temporal": training.get(f"{name}, train: temporal"),
            }
        )
    return rows


def display_name(name: str) -> str:
    """As the page shows the name of a network of `benchmarks.denoiser`."""
    preset, _, trained = name.removeprefix("VideoUNet, ").partition(", train: ")
    return (f"`{preset}`" if name.startswith("VideoUNet") else preset) + (f", `{trained}`" if trained else "")


def ratio(row: Report | None) -> str:
    """The ratio of a row with its range, or nothing."""
    if row is None:
        return ""
    return (
        "1"
        if row["ratio_low"] == row["ratio_high"] == 1
        else "{ratio:.2f} ({ratio_low:.2f} to {ratio_high:.2f})".format(**row)
    )


def render(reports: Mapping[str, Report], printed: Mapping[str, str], commands: Mapping[str, str], remark: str) -> str:
    """The page."""
    launches = sorted(reports["counts"]["launches"].items(), key=lambda item: item[1]["bytes"])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("performance.md.jinja").render(
        machine=machine(),
        remark=remark,
        networks=network_rows(reports),
        reference=reports["counts"]["flops"][REFERENCE],
        launches=[{"name": display_name(name), **row} for name, row in launches],
        loops=reports["loops"]["sampling"],
        loops_steps=reports["loops"]["steps"],
        settings=reports["settings"],
        settings_table=settings_table(reports["settings"]["settings"]),
        loader=reports["loader"],
        printed=printed,
        commands=commands,
        ratio=ratio,
    )


def machine() -> dict[str, str]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": f"{len(models)} cores of {models[0]}" if models else platform.processor() or "an unnamed processor",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def draw(rows: list[Report], path: Path) -> None:
    """Bars of operations, forward and training step of each network, with the range of the times."""
    from matplotlib.figure import Figure

    kinds = {"flops": "operations", "forward": "forward", "training": "training step", "temporal": "training, temporal"}
    figure = Figure(figsize=(9, 0.62 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    for offset, (kind, label) in enumerate(kinds.items()):
        bars = [(place, row[kind]) for place, row in enumerate(rows) if row[kind]]
        values = [row["ratio"] for _, row in bars]
        errors = [
            [abs(row.get(f"ratio_{end}", row["ratio"]) - row["ratio"]) for _, row in bars] for end in ("low", "high")
        ]
        axes.barh([place + 0.2 * offset for place, _ in bars], values, 0.18, xerr=errors, label=label)
    axes.set_yticks([place + 0.3 for place in range(len(rows))], [row["name"].strip("`") for row in rows])
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("ratio to the 2D UNet, frame by frame")
    axes.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    """Reads the command line, runs the benchmarks and writes the page."""
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/performance", help="folder of what has been measured")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page and its figures")
    parser.add_argument("--remark", default="", help="a sentence on the page, such as what else the machine did")
    parser.add_argument("--quick", action="store_true", help="tiny networks and a clip: shows that it runs")
    arguments = parser.parse_args(argv)
    arguments.work, arguments.out = arguments.work.resolve(), arguments.out.resolve()
    return run(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
