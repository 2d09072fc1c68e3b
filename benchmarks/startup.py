"""Processor time from the start of a process to what its user waits for, beside the import of PyTorch: `python -m benchmarks.startup`."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reporting import make_parser, run

# Ends the process when the video network is first called.
_TO_FIRST_STEP = """
import os, sys
from microcinema.models.video_unet import VideoUNet
VideoUNet.forward = lambda *args, **kwargs: os._exit(0)
from microcinema.commands.cli import main
sys.exit(main(sys.argv[1:]) or 1)
"""
COMMANDS = {
    "`import torch`": ["-c", "import torch"],
    "`microcinema --help`": ["-m", "microcinema", "--help"],
    "`microcinema sample --print-config`": ["-m", "microcinema", "sample", "--print-config"],
    "`microcinema sample`, one key frame of 10 steps, to the first step of the video": [
        *("-c", _TO_FIRST_STEP, "sample", "prompt=a large red star on sand", "keyframe.num_inference_steps=10"),
        "output_dir=out",
    ],
}


def processor_seconds(command: Sequence[str], folder: Path) -> float:
    """Processor time of a Python process and its threads, run in a folder; one that fails raises `CalledProcessError`."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
    return usage.ru_utime + usage.ru_stime


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Prints a table of medians."""
    print("| | seconds |\n| --- | ---: |")
    report = {}
    for name, command in COMMANDS.items():
        seconds = []
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as folder:
                seconds.append(processor_seconds(command, Path(folder)))
        report[name] = statistics.median(seconds)
        print(f"| {name} | {report[name]:.2f} |")
    return report


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and runs the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each, of which the median counts")
    return run(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
