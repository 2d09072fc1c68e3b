"""What the benchmarks share: options, interleaved timing, and the report as JSON."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from microcinema.utils.errors import UserError
from microcinema.utils.files import write_json

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Elapsed time, or the processor time of this process, which other load on the machine hardly changes."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the module's docstring as its description, and `--json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    return parser


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Adds `--clock`."""
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="elapsed time, or processor time of the process"
    )


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Adds the options of timed networks."""
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--latents", type=int, help="height and width of the latents")
    add_clock(parser)


def compare_seconds(
    actions: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float], label: str, reference: str
) -> dict[str, dict[str, float]]:
    """Times the actions in interleaved rounds, after a warm-up round.

    Returns:
        Of each action the median `seconds`, and the median `ratio` to the reference in the same round, with the least and the largest.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    with tqdm(total=(rounds + 1) * len(actions), desc=label) as bar:
        for _ in range(rounds + 1):
            for name, action in actions.items():
                start = clock()
                action()
                seconds[name].append(clock() - start)
                bar.update()
    rows = {}
    for name, values in seconds.items():
        ratios = [one / other for one, other in zip(values[1:], seconds[reference][1:], strict=True)]
        rows[name] = {"seconds": statistics.median(values[1:])} | spread(ratios, "ratio")
    return rows


def spread(values: Sequence[float], name: str) -> dict[str, float]:
    """The median of a figure, under its name, with `_low` and `_high`."""
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """What timings depend on beside the networks."""
    return {"clock": arguments.clock, "threads": torch.get_num_threads(), "torch": torch.__version__}


def run(measure: Callable[[argparse.Namespace], dict[str, Any]], arguments: argparse.Namespace) -> int:
    """Runs a benchmark and writes its report; returns the exit status, 2 for bad input."""
    try:
        report = measure(arguments)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    if arguments.json:
        write_json(arguments.json, report)
    return 0
