"""Video files to frames.

Frames are `uint8 (f, h, w, 3)` RGB arrays everywhere in this file. Reading picks frames by their presentation times, so variable frame
rates come out right; both decoders convert colours with swscale's plain 8-bit path and so give the same bytes (tests/data/test_video_reader.py).
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from microcinema.utils.errors import UserError

if TYPE_CHECKING:
    import av
    import av.container
    import av.video.stream

DECODERS = ("pyav", "decord")
_TICK = 1e-6  # seconds; times closer than this are equal, so that float rounding never decides which frame is nearest

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar file, which FFmpeg reads where it lies: `size` bytes from `offset` on."""

    archive: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"


Source = PathLike | Member


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds: frames, mean frames per second, size as displayed (rotation applied), seconds from first frame to end."""

    num_frames: int
    fps: float
    width: int
    height: int
    duration: float


@dataclass(frozen=True)
class _Index:
    """Every frame's time in seconds after the first frame, ascending, and its presentation stamp (None: the container stores none)."""

    times: np.ndarray
    stamps: list[int] | None
    end: float
    fps: float


@contextmanager
def _opened(path: Source) -> Iterator[tuple["av.container.InputContainer", "av.video.stream.VideoStream"]]:
    """Opens a file's first video stream; whatever FFmpeg finds wrong with it, here or in the body, is a UserError naming the file."""
    import av

    file = Path(path.archive if isinstance(path, Member) else path)
    if not file.is_file():
        raise UserError(f"video file '{file}' does not exist; check the path")
    if _size(path) == 0:
        raise UserError(f"video file '{path}' is empty (0 bytes); fetch or write it again")
    try:
        with av.open(_url(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise UserError(f"file '{path}' has no video stream; give a video file")
            stream = container.streams.video[0]
            # One thread: data-loader workers are the parallelism, and a decoder's own threads would oversubscribe the machine.
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, EOFError) as error:
        raise UserError(f"{_damaged(path)} ({getattr(error, 'strerror', None) or error})") from None


def _url(path: Source) -> str:
    """The name under which FFmpeg opens it."""
    if isinstance(path, Member):
        return f"subfile,,start,{path.offset},end,{path.offset + path.size},,:{path.archive}"
    return str(path)


def _size(path: Source) -> int:
    return path.size if isinstance(path, Member) else os.path.getsize(path)


def _damaged(path: Source) -> str:
    return (
        f"video file '{path}' cannot be decoded: damaged, truncated or not a video; replace it or take it off the list"
    )


def _index(path: Source, container: "av.container.InputContainer", stream: "av.video.stream.VideoStream") -> _Index:
    """Reads the packets' time stamps without decoding."""
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    entries = stream.index_entries  # what the file's header promises; a truncated file ends before its last entry
    cut = len(entries) and entries[-1].pos + entries[-1].size > _size(path)
    if cut or any(packet.is_corrupt for packet in packets):
        raise UserError(f"{_damaged(path)} (its header promises more frames)")
    if not packets:
        raise UserError(f"video file '{path}' holds no frames; replace it or take it off the list")
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
    # AVI stores no time stamps (FFmpeg guesses some, wrongly with B-frames): its frame k is at k / rate, by definition of the format.
    if container.format.name == "avi" or len(set(stamps)) < len(packets):
        if rate <= 0:
            raise UserError(f"video file '{path}' stores neither time stamps nor a frame rate; convert it to mp4")
        times = np.arange(len(packets)) / rate
        return _Index(times, None, end=len(packets) / rate, fps=rate)
    base = float(stream.time_base or 0)
    times = (np.array(stamps) - stamps[0]) * base
    last = max(packets, key=lambda packet: packet.pts or 0)
    shown = (last.duration or 0) * base or (1 / rate if rate > 0 else 0.0)  # how long the last frame stays on screen
    end = float(times[-1]) + shown
    return _Index(times, stamps, end, fps=rate if rate > 0 else len(packets) / end)


def probe(path: Source) -> VideoInfo:
    """Counts and times the frames of a video file and decodes the first one.

    Raises:
        UserError: the file is missing, empty, unreadable or truncated, or has no video.
    """
    with _opened(path) as (container, stream):
        index = _index(path, container, stream)
    height, width = _decode_pyav(path, index, np.zeros(1, dtype=int)).shape[1:3]
    return VideoInfo(len(index.times), index.fps, width, height, index.end)


def nearest_frames(times: np.ndarray, wanted: np.ndarray | float) -> np.ndarray:
    """Index of the frame whose time is nearest to each wanted time; of two equally near ones, the earlier."""
    middles = (times[1:] + times[:-1]) / 2
    return np.searchsorted(middles, np.asarray(wanted) - _TICK, side="left")


def _choose(
    path: Source, index: _Index, num_frames: int, fps: float | None, start: float, position: float
) -> np.ndarray:
    times = index.times
    if num_frames < 1:
        raise UserError(f"num_frames={num_frames} for '{path}'; ask for at least 1 frame")
    if fps is not None and not fps > 0:
        raise UserError(f"fps={fps} for '{path}'; give a positive number, or null for the file's own rate")
    if start < 0 or not 0 <= position <= 1:
        raise UserError(
            f"start={start}, position={position} for '{path}'; start is at least 0 seconds, position lies in [0, 1]"
        )

    def too_short() -> UserError:
        asked = f"{num_frames} frames at {f'{fps:g}' if fps else 'its own'} fps from {start:g} s"
        has = f"{len(times)} frames at {index.fps:g} fps, {index.end:.3f} s"
        return UserError(
            f"clip '{path}' ({has}) is shorter than asked ({asked}); ask for fewer frames or take it off the list"
        )

    def pick(starts: np.ndarray) -> Any:
        return starts[min(int(position * len(starts)), len(starts) - 1)]  # each as likely if the position is

    if fps is None:
        first = int(nearest_frames(times, start)) if start < index.end else len(times)
        if first + num_frames > len(times):
            raise too_short()
        return pick(np.arange(first, len(times) - num_frames + 1)) + np.arange(num_frames)
    span = (num_frames - 1) / fps
    if start + span > index.end - _TICK:  # the last wanted moment must still be on screen
        raise too_short()
    # Elsewhere than at `start`, begin exactly on a frame: between two, jitter in the stamps would pick an uneven rhythm.
    starts = times[(times > start - _TICK) & (times < times[-1] - span + _TICK)]
    moment = pick(starts) if position > 0 and len(starts) else start
    return nearest_frames(times, moment + np.arange(num_frames) / fps)


def _decode_pyav(path: Source, index: _Index, wanted: np.ndarray) -> np.ndarray:
    from av.video.reformatter import VideoReformatter

    needed, last = set(wanted.tolist()), int(wanted.max())
    frames: dict[int, np.ndarray] = {}
    convert = VideoReformatter()
    with _opened(path) as (container, stream):
        numbers = None if index.stamps is None else {stamp: number for number, stamp in enumerate(index.stamps)}
        # From the key frame before the first wanted frame; should the container's seek table be wrong, from the beginning.
        for origin in [0] if index.stamps is None else [index.stamps[int(wanted.min())], index.stamps[0]]:
            if index.stamps is not None:
                container.seek(origin, stream=stream, backward=True)
            for count, frame in enumerate(container.decode(stream)):
                number = count if numbers is None else numbers.get(frame.pts, -1)  # type: ignore[arg-type]
                if number in needed and not frame.is_corrupt:
                    pixels = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
                    frames[number] = np.rot90(pixels, (frame.rotation // 90) % 4)
                if number >= last:
                    break
            if len(frames) == len(needed):
                return np.stack([frames[number] for number in wanted.tolist()])
    raise UserError(f"{_damaged(path)} (frame {min(needed - set(frames))} of {len(index.times)} is missing)")


def _decode_decord(path: Source, index: _Index, wanted: np.ndarray) -> np.ndarray:
    import decord

    needed, frames = set(wanted.tolist()), {}
    try:
        # fault_tol: by default decord quietly repeats frames in the place of those that it could not decode.
        reader = decord.VideoReader(_url(path), num_threads=1, fault_tol=1e-9)
        if len(reader) == len(index.times):
            # In order from the first frame: where decord seeks, it gives wrong frames if the key frame is no fresh start.
            for number in range(max(needed) + 1):
                frame = reader.next()
                if number in needed:
                    # Rows come padded to 32 pixels; if that divides by the width, decord takes the padding for more channels.
                    height, width = frame.shape[:2]
                    frames[number] = frame.asnumpy().reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
            return np.stack([frames[number] for number in wanted.tolist()])
    except (decord.DECORDError, RuntimeError, StopIteration):
        pass
    # What decord refuses, PyAV says what is wrong with, or reads to the same bytes.
    return _decode_pyav(path, index, wanted)


def read_clip(
    path: Source,
    num_frames: int,
    fps: float | None = None,
    start: float = 0.0,
    position: float = 0.0,
    decoder: str = "pyav",
) -> np.ndarray:
    """Reads `num_frames` frames: for each k the frame nearest in time to `start + k / fps`.

    Args:
        fps: frames per second of the clip; None takes neighbouring frames as they are in the file.
        start: seconds after the first frame.
        position: where in the room that the video leaves the clip lies: 0 at `start`, 0.5 in the middle, 1 as late as
            possible. Uniform over [0, 1), it makes every possible first frame equally likely.
        decoder: "pyav" or "decord". Same bytes from both for 8-bit video, but for 4:2:0 of odd size, which H.264 cannot hold.

    Returns:
        uint8 (f, h, w, 3), rotated as displayed.

    Raises:
        UserError: a file that is missing, empty, damaged, without video, or shorter than asked; a value out of range.
    """
    if decoder not in DECODERS:
        raise UserError(f"decoder='{decoder}' is not known; choose one of {', '.join(DECODERS)}")
    with _opened(path) as (container, stream):
        index = _index(path, container, stream)
    wanted = _choose(path, index, num_frames, fps, start, position)
    return (_decode_pyav if decoder == "pyav" else _decode_decord)(path, index, wanted)


def survey(path: Source, size: tuple[int, int], fps: float, most: int) -> tuple[VideoInfo, np.ndarray, np.ndarray]:
    """Decodes a video from its first frame on and keeps small frames, one for each tick of `fps`: what an audit looks at.

    Args:
        size: (height, width) to which frames are scaled, whatever their aspect ratio.
        most: frames kept at most; what comes after them is not decoded.

    Returns:
        what the file holds; seconds after the first frame of each frame kept; the frames, uint8 (n, h, w, 3).

    Raises:
        UserError: as `read_clip`; also where a single frame is damaged.
    """
    from av.video.reformatter import VideoReformatter

    convert = VideoReformatter()
    times: list[float] = []
    frames: list[np.ndarray] = []
    with _opened(path) as (container, stream):
        index = _index(path, container, stream)
    # The frames on screen at the ticks, as numbers of frames in the order of their times.
    wanted = np.unique(nearest_frames(index.times, np.arange(0, index.times[-1] + _TICK, 1 / fps)))[:most]
    needed, count, shape = set(wanted.tolist()), 0, (0, 0)
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise UserError(f"{_damaged(path)} (frame {count} is corrupt)")
            if count in needed:
                turns = (frame.rotation // 90) % 4
                shape = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
                height, width = size[::-1] if turns % 2 else size
                small = convert.reformat(frame, width=width, height=height, format="rgb24", interpolation="AREA")
                frames.append(np.rot90(small.to_ndarray(), turns))
                times.append(float(index.times[count]))
            count += 1
            if len(frames) == len(wanted):
                break
    if len(frames) < len(wanted):
        raise UserError(f"{_damaged(path)} (frame {count} of {len(index.times)} is missing)")
    info = VideoInfo(len(index.times), index.fps, shape[1], shape[0], index.end)
    return info, np.array(times), np.stack(frames)


def read_image(path: Source) -> np.ndarray:
    """A picture file as a clip of one frame, uint8 (1, h, w, 3), turned as its EXIF data says.

    Raises:
        UserError: the file is missing or no picture.
    """
    from PIL import Image, ImageOps

    try:
        with open(path.archive if isinstance(path, Member) else path, "rb") as file:
            if isinstance(path, Member):
                file.seek(path.offset)
            with Image.open(io.BytesIO(file.read(_size(path)))) as image:
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))[None]
    except FileNotFoundError:
        raise UserError(f"image file '{path}' does not exist; check the path") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"image file '{path}' cannot be decoded ({error}); replace it or take it off the list"
        ) from None
