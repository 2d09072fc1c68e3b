"""Processor time to decode a clip of an H.264 file, beside PyAV and decord used plainly for the same frames: `python -m benchmarks.decoding`.

Files of 450 frames of 596x336 at 30 frames per second, with a key frame every 250 and every 25 frames; clips of 16 frames at 8 per second.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from benchmarks.reporting import make_parser, run, spread
from microcinema.data import video_reader
from microcinema.utils.errors import UserError

FPS, NUM_FRAMES = 30, 450
RATIOS = ("of_pyav", "of_decord")


def write(path: Path, gop: int, num_frames: int = NUM_FRAMES) -> Path:
    """A wide noisy picture that passes, with a small one that moves over it."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 256, (24, 90, 3), np.uint8), (1788, 336), interpolation=cv2.INTER_CUBIC)
    wide = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    small = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (90, 90))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"x264-params": f"keyint={gop}:min-keyint={gop}"})
        stream.height, stream.width, stream.pix_fmt = 336, 596, "yuv420p"
        for k in range(num_frames):
            left, top, over = (
                int(590 + 560 * np.sin(k / 70)),
                int(120 + 100 * np.sin(k / 9)),
                int(240 + 200 * np.cos(k / 13)),
            )
            picture = wide[:, left : left + 596].copy()
            picture[top : top + 90, over : over + 90] = small
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


def plain_pyav(path: Path, numbers: list[int]) -> np.ndarray:
    """From the key frame on, every frame, of which those are kept."""
    frames = []
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        file.seek(int(numbers[0] / FPS / stream.time_base), stream=stream)
        for frame in file.decode(stream):
            if round(frame.pts * stream.time_base * FPS) in numbers:
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == len(numbers):
                    break
    return np.stack(frames)


def plain_decord(path: Path, numbers: list[int]) -> np.ndarray:
    """As its documentation reads frames by their numbers."""
    import decord

    return decord.VideoReader(str(path), num_threads=1).get_batch(numbers).asnumpy()


def measure_file(path: Path, rounds: int) -> dict[str, float]:
    """Median milliseconds of each, and the ratios to the two others (`spread`), over clips at random positions."""
    times, seconds = video_reader.read_index(path).times, defaultdict(list)
    for position in np.random.default_rng(0).random(rounds):
        starts = times[times < times[-1] - 15 / 8 + 1e-6]
        begin = starts[min(int(position * len(starts)), len(starts) - 1)]
        numbers = video_reader.nearest_frames(times, begin + np.arange(16) / 8).tolist()
        clips = {}
        for name, read in (
            ("microcinema", lambda: video_reader.read_clip(path, 16, 8.0, position=float(position))),  # noqa: B023
            ("pyav", lambda: plain_pyav(path, numbers)),  # noqa: B023
            ("decord", lambda: plain_decord(path, numbers)),  # noqa: B023
        ):
            began = time.process_time()
            clips[name] = read()
            seconds[name].append(time.process_time() - began)
        if not (clips["microcinema"] == clips["pyav"]).all():
            raise UserError("the clip has other bytes than PyAV's")
    found = {f"{name}_ms": 1000 * statistics.median(values) for name, values in seconds.items()}
    for name in ("pyav", "decord"):
        pairs = zip(seconds["microcinema"], seconds[name], strict=True)
        found |= spread([ours / theirs for ours, theirs in pairs], f"of_{name}")
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a table."""
    print("| frames between key frames | ms | of PyAV's time | of decord's |\n| ---: | ---: | ---: | ---: |")
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for gop in (250, 25):
            found = measure_file(write(Path(folder) / f"{gop}.mp4", gop), arguments.rounds)
            ratios = (f"{found[k]:.2f} ({found[f'{k}_low']:.2f} to {found[f'{k}_high']:.2f})" for k in RATIOS)
            print(f"| {gop} | {found['microcinema_ms']:.0f} | {' | '.join(ratios)} |")
            report[str(gop)] = found
    return report


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and runs the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="clips of each file")
    return run(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
