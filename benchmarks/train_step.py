"""Time of each component of the trainer's own step, for one or more runs side by side, such as raw clips and cached latents.

python -m benchmarks.train_step --run "raw clips" --run "double batch" train_batch_size=8
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from benchmarks.reporting import CLOCKS, add_clock, environment, make_parser, run
from benchmarks.step_timer import PARTS, StepTimer
from microcinema.config.compose import compose
from microcinema.config.schema import Train
from microcinema.training.build import build_trainer
from microcinema.utils.errors import UserError

WARM_UP = 2  # steps
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
            timings = time_steps(composed, arguments.steps, CLOCKS[arguments.clock])
        runs[name] = {"overrides": overrides, **timings}
    if os.environ.get("RANK", "0") == "0":
        print_table(runs)
    else:
        arguments.json = None  # one process writes the report
    return {"overrides": arguments.overrides, **environment(arguments), "runs": runs}


def time_steps(config: Train, steps: int, clock: Callable[[], float]) -> dict[str, float]:
    """Times the training steps of a run; medians over steps. Collective.

    Args:
        config: its output_dir should be a new folder.
        steps: to measure, after two that do not count; as many clips are read.
        clock: `time.process_time` for the time of this process alone, on a machine that others use.

    Returns:
        Seconds of the whole `step`, of each of `PARTS`, of `other`, and of `communication` between several processes. Also
        `decoding`, seconds in which one worker reads a clip; `data_wait`, the share of the step spent waiting for the workers, by
        the wall clock; `clips` of this process in a step; `peak_memory_gib`.
    """
    total = WARM_UP + steps
    changes: dict[str, Any] = {
        "max_train_steps": total,
        "checkpointing_steps": total,
        "validation_prompts": [],
        "logging_steps": 1,
    }
    config = replace(config, **changes, validation_data=None, report_to=None, resume_from_checkpoint=None)
    timer, hook = StepTimer(clock), config.ddp.comm_hook
    config = replace(config, ddp=replace(config.ddp, comm_hook=None))  # the timer's own takes its place
    trainer = build_trainer(config, timer.on_metrics, timer.region)
    if isinstance(trainer.model, DistributedDataParallel):
        wrap = getattr(default_hooks, f"{hook}_compress_wrapper") if hook else lambda communication: communication
        trainer.model.register_comm_hook(None, wrap(timer.communication))
    decoding = []
    for index in range(total):
        start = clock()
        trainer.clips[index]
        decoding.append(clock() - start)
    trainer.train()
    trainer.accelerator.end_training()

    measured = timer.steps[-steps:]
    parts = ("step", *PARTS, *(["communication"] if "communication" in measured[-1] else []))
    seconds = {part: statistics.median(step.get(part, 0.0) for step in measured) for part in parts}
    seconds["other"] = max(0.0, seconds["step"] - sum(seconds[part] for part in PARTS))
    seconds["decoding"] = statistics.median(decoding[WARM_UP:])
    return seconds | {
        "data_wait": statistics.median(metrics["data_wait"] for metrics in timer.metrics[-steps:]),
        "peak_memory_gib": timer.metrics[-1]["peak_memory_gib"],
        "clips": config.train_batch_size * config.gradient_accumulation_steps,
    }


def print_table(runs: dict[str, dict[str, Any]]) -> None:
    """Prints a Markdown table."""
    print(f"\n| ms for a clip (share of the step) | {' | '.join(runs)} |")
    print("| --- |" + " ---: |" * len(runs))
    for part in ("step", *PARTS, "other", "communication"):
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
