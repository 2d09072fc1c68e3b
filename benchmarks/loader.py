"""What a loader of decoded clips takes of memory and time: `python -m benchmarks.loader --clips 20000`.

Real files, random parts of them, worker processes, a decoder process beside each: the memory of all of them, what they share counted once. Linux.
"""

import argparse
import csv
import re
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
from torch.utils.data import DataLoader

from benchmarks.reporting import make_parser, run
from microcinema.data.clips import ClipDataset
from microcinema.data.indexed import DistributedBatchSampler, IndexedDataset
from microcinema.data.quarantine import Quarantine
from microcinema.data.video_writer import write_video

FILES = 24


def write_clips(folder: Path, height: int, width: int) -> Path:
    """Some videos of 24 frames with moving smooth pictures, and their list."""
    rng = np.random.default_rng(0)
    for k in range(FILES):
        coarse = rng.integers(0, 256, (6, 14, 3), np.uint8)
        wide = cv2.resize(coarse, (2 * width, height), interpolation=cv2.INTER_CUBIC)
        write_video(folder / f"{k}.mp4", np.stack([wide[:, 2 * f : 2 * f + width] for f in range(24)]), 8)
    with open(folder / "clips.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("videoid", "name"), *((str(k), f"clip {k}") for k in range(FILES))])
    return folder / "clips.csv"


def memory() -> int:
    """Bytes that this process and all below it have written, each page once.

    Pages of files, such as libraries, are left out: they count for less while another program on the machine happens to use them too.
    """
    this = psutil.Process()
    total = 0
    for process in [this, *this.children(recursive=True)]:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (OSError, psutil.NoSuchProcess):
            continue
        total += sum(1024 * int(size) for size in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", rollup, re.MULTILINE))
    return total


def read_clips(
    clips: int, warm: int, decoder: str, timeout: float | None, num_workers: int, size: tuple[int, int], folder: Path
) -> dict[str, float]:
    """Reads so many clips in batches of 4; memory after `warm` of them and the most after that, in bytes."""
    listing = write_clips(folder, *size)
    data = ClipDataset(listing, folder, 16, 8.0, 64, decoder=decoder, timeout=timeout)
    numbered = IndexedDataset(data, 0, Quarantine(folder / "quarantine"))
    loader = DataLoader(numbered, batch_sampler=DistributedBatchSampler(0, clips, 4), num_workers=num_workers)
    before, most, began, every = 0, 0, time.perf_counter(), max(1, (clips - warm) // 20 // 4)
    for number, _ in enumerate(loader, start=1):
        if 4 * number == warm:
            before = memory()
        elif 4 * number > warm and (number % every == 0 or 4 * number == clips):
            most = max(most, memory())
    seconds = time.perf_counter() - began
    return {
        "clips": clips,
        "warm": warm,
        "before": before,
        "most": most,
        "growth": most / before - 1,
        "clips_per_second": clips / seconds,
    }


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Prints the memory and the clips read in a second."""
    with tempfile.TemporaryDirectory() as folder:
        found = read_clips(
            arguments.clips,
            arguments.warm,
            arguments.decoder,
            arguments.timeout or None,
            arguments.num_workers,
            tuple(arguments.size),
            Path(folder),
        )
    print(f"{found['clips_per_second']:.0f} clips a second")
    print(
        f"{found['before'] / 1e6:.0f} MB after {arguments.warm} clips, at most {found['most'] / 1e6:.0f} MB after that"
    )
    return found


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and runs the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--clips", type=int, default=20000, help="clips to read")
    parser.add_argument("--warm", type=int, default=2000, help="clips after which memory is first measured")
    parser.add_argument("--decoder", default="pyav", help="pyav or decord")
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds for a clip; 0: decode in the workers themselves"
    )
    parser.add_argument("--num-workers", type=int, default=2, help="worker processes")
    parser.add_argument("--size", type=int, nargs=2, default=(336, 596), help="height and width of the videos")
    return run(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
