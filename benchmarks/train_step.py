"""Time of each component of the trainer's own step, for one or more runs side by side, such as raw clips and cached latents.

python -m benchmarks.train_step --run "raw clips" --run "double batch" train_batch_size=8
"""

import argparse
import os
import sys
import tempfile
from typing import Any

from benchmarks.reporting import CLOCKS, add_clock, environment, make_parser, run
from microcinema.config.compose import compose
from microcinema.profiling import step_timer
from microcinema.utils.errors import UserError

FIGURES = {  # name in the report: title, scale and format in the table
    "decoding": ("decoding a clip, by one worker", 1000, "{:.1f}"),
    "data_wait": ("waiting for workers", 1, "{:.1%}"),
    "peak_memory_gib": ("GiB at most", 1, "{:.2f}"),
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a table with one column for each run: milliseconds for a clip, and shares of the step.

    Raises:
        UserError: several runs under several processes.
    """
    columns = arguments.columns or [["training"]]
    if len(columns) > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{len(columns)} runs under several processes; measure one --run for each launch")
    runs = {}
    for name, *overrides in columns:
        with tempfile.TemporaryDirectory() as folder:
            composed = compose("train", [*arguments.overrides, *overrides, f"output_dir={folder}"])
            timings = step_timer.measure(composed, arguments.steps, CLOCKS[arguments.clock])
        runs[name] = {"overrides": overrides, **timings}
    if os.environ.get("RANK", "0") == "0":
        print_table(runs)
    else:
        arguments.json = None  # one process writes the report
    return {"overrides": arguments.overrides, **environment(arguments), "runs": runs}


def print_table(runs: dict[str, dict[str, Any]]) -> None:
    """Prints a Markdown table."""
    print(f"\n| ms for a clip (share of the step) | {' | '.join(runs)} |")
    print("| --- |" + " ---: |" * len(runs))
    for part in ("step", *step_timer.PARTS, "other", "communication"):
        if any(part in timings for timings in runs.values()):
            cells = [
                f"{1000 * each[part] / each['clips']:.1f} ({each[part] / each['step']:.0%})" for each in runs.values()
            ]
            print(f"| {part} | {' | '.join(cells)} |")
    for figure, (title, scale, form) in FIGURES.items():
        print(f"| {title} | {' | '.join(form.format(scale * timings[figure]) for timings in runs.values())} |")


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and runs the benchmark."""
    parser = make_parser(__doc__)
    add_clock(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of `microcinema train`, for all runs")
    parser.add_argument(
        "--run", dest="columns", nargs="+", action="append", metavar=("NAME", "key=value"), help="a column and its keys"
    )
    parser.add_argument("--steps", type=int, default=10, help="steps after the warm-up")
    return run(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
