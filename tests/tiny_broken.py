"""Video files as data sets of the wild have them, sound and broken, made with PyAV. Import as `import tiny_broken`."""

import csv
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from microcinema.data import video_writing

FRAMES, FPS, SIZE = 16, 8, 64


def frames(seed: int, count: int = FRAMES, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """A smooth picture that moves to the side: uint8 (f, h, w, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 10, 3), np.uint8)
    wide = cv2.resize(coarse, (2 * width, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([wide[:, k : k + width] for k in range(count)])


def sound(path: Path, seed: int) -> None:
    video_writing.write_video(path, frames(seed), FPS)


def empty(path: Path, seed: int) -> None:
    path.write_bytes(b"")


def truncated_header(path: Path, seed: int) -> None:
    sound(path, seed)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") + 100])


def truncated_middle(path: Path, seed: int) -> None:
    """Index first, as the web has it, so it opens; the second half of the frames is gone."""
    sound(path, seed)
    data = path.read_bytes()
    path.write_bytes(data[: (data.index(b"mdat") + len(data)) // 2])


def wrong_extension(path: Path, seed: int) -> None:
    """The page that a server sent instead of the video."""
    path.write_text("<html><body>404 Not Found</body></html>\n" * 20)


def audio_only(path: Path, seed: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        tone = (8000 * np.sin(np.arange(16000) / 8)).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])


def zero_duration(path: Path, seed: int) -> None:
    """A video stream without a frame."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options={"x264-params": "keyint=1"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        container.start_encoding()


def one_frame(path: Path, seed: int) -> None:
    video_writing.write_video(path, frames(seed, count=1), FPS)


def variable_frame_rate(path: Path, seed: int) -> None:
    gaps = [40, 90, 200] * 8
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for k, array in enumerate(frames(seed, count=len(gaps))):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = sum(gaps[:k]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def rotated(path: Path, seed: int) -> None:
    """Stored on its side: the track header's matrix (ISO 14496-12) says to turn it by 90 degrees."""
    video_writing.write_video(path, frames(seed, height=64, width=96), FPS)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def odd_size(path: Path, seed: int) -> None:
    video_writing.write_video(path, frames(seed, height=67, width=81), FPS)


class Hanging:
    """Stands in for a file whose decoder hangs: a power of ten of a hundred million digits, some minutes inside one function written in C,
    which holds the interpreter's lock, so that neither a signal's handler nor another thread could end it."""

    def __fspath__(self) -> str:
        return str(Fraction("1e100000000"))


# The ten kinds, and why each cannot be used: None, it can.
KINDS: dict[str, tuple[Callable[[Path, int], None], str | None]] = {
    "empty": (empty, "is empty"),
    "truncated_header": (truncated_header, "no video stream"),
    "truncated_middle": (truncated_middle, "promises more frames"),
    "wrong_extension": (wrong_extension, "cannot be decoded"),
    "audio_only": (audio_only, "no video stream"),
    "zero_duration": (zero_duration, "holds no frames"),
    "one_frame": (one_frame, "is shorter than asked"),
    "variable_frame_rate": (variable_frame_rate, None),
    "rotated": (rotated, None),
    "odd_size": (odd_size, None),
}


def dataset(folder: Path, num_sound: int, copies: int = 1) -> Path:
    """A folder of `num_sound` plain videos and each of the ten kinds `copies` times, with a WebVid-style list, which is returned."""
    makers = {f"sound{k}": sound for k in range(num_sound)}
    makers |= {f"{kind}-{k}": make for kind, (make, _) in KINDS.items() for k in range(copies)}
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, make) in enumerate(makers.items()):
        make(folder / f"{name}.mp4", seed)
    listing = folder / "clips.csv"
    with open(listing, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("videoid", "name"), *((name, f"a clip of kind {name}") for name in makers)])
    return listing
