"""Video and picture files to frames, uint8 (f, h, w, 3) RGB arrays.

Frames are selected by presentation time, so variable frame rates come out right. Both decoders convert colors with swscale's plain 8-bit path
and so give the same bytes (tests/data/test_video_reader.py).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from microcinema.utils.errors import UserError, check_choice

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

DECODERS = ("pyav", "decord")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_TICK = 1e-6  # seconds; times closer than this are equal, so that float rounding never decides which frame is nearest

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class TarMember:
    """A file inside an uncompressed tar file, which FFmpeg reads in place: `size` bytes from `offset` on."""

    archive: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"

    def read(self) -> bytes:
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


Source = PathLike | TarMember


@dataclass(frozen=True)
class VideoInfo:
    """Frames, mean frames per second, size as displayed (rotated), and seconds from the first frame to the end of a video."""

    num_frames: int
    fps: float
    width: int
    height: int
    duration: float


@dataclass(frozen=True)
class _Index:
    """Time of every frame in seconds after the first one, ascending, and presentation time stamps (None: the container stores none)."""

    times: np.ndarray
    stamps: list[int] | None
    end: float
    fps: float


def is_image(source: Source) -> bool:
    """Whether a file is a picture, by its name."""
    name = source.name if isinstance(source, TarMember) else str(source)
    return name.lower().endswith(IMAGES)


def _size(path: Source) -> int:
    return path.size if isinstance(path, TarMember) else os.path.getsize(path)


def _url(path: Source) -> str:
    """The name under which FFmpeg opens a file."""
    if isinstance(path, TarMember):
        return f"subfile,,start,{path.offset},end,{path.offset + path.size},,:{path.archive}"
    return str(path)


def _damaged(path: Source, reason: Any) -> UserError:
    what = "damaged, truncated or not a video; replace it or take it off the list"
    return UserError(f"video file '{path}' cannot be decoded: {what} ({reason})")


@contextmanager
def _open(path: Source) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Opens a file's first video stream; any error of FFmpeg, here or in the body, becomes a UserError that names the file."""
    import av

    file = Path(path.archive if isinstance(path, TarMember) else path)
    if not file.is_file():
        raise UserError(f"video file '{file}' does not exist; check the path")
    if _size(path) == 0:
        raise UserError(f"video file '{path}' is empty (0 bytes); fetch or write it again")
    try:
        with av.open(_url(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise UserError(f"file '{path}' has no video stream; give a video file")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # data-loader workers are the parallelism
            yield container, stream
    except (av.FFmpegError, EOFError) as error:
        raise _damaged(path, getattr(error, "strerror", None) or error) from None


def _read_index(path: Source) -> _Index:
    """Reads the packets' time stamps without decoding."""
    with _open(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        entries = stream.index_entries  # as the header promises; a truncated file ends before its last entry
        truncated = len(entries) and entries[-1].pos + entries[-1].size > _size(path)
        if truncated or any(packet.is_corrupt for packet in packets):
            raise _damaged(path, "its header promises more frames")
        if not packets:
            raise UserError(f"video file '{path}' holds no frames; replace it or take it off the list")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
        # AVI stores no time stamps (FFmpeg guesses some, wrongly with B-frames): its frame k is at k / rate, by definition of the format.
        if container.format.name == "avi" or len(set(stamps)) < len(packets):
            if rate <= 0:
                raise UserError(f"video file '{path}' stores neither time stamps nor a frame rate; convert it to mp4")
            return _Index(np.arange(len(packets)) / rate, None, end=len(packets) / rate, fps=rate)
        time_base = float(stream.time_base or 0)
        times = (np.array(stamps) - stamps[0]) * time_base
        last = max(packets, key=lambda packet: packet.pts or 0)
        end = float(times[-1]) + ((last.duration or 0) * time_base or (1 / rate if rate > 0 else 0.0))
        return _Index(times, stamps, end, fps=rate if rate > 0 else len(packets) / end)


def probe(path: Source) -> VideoInfo:
    """Counts and times the frames of a video and decodes the first one; a UserError if the file is missing, damaged or without video."""
    index = _read_index(path)
    ((height, width),) = _decode_pyav(path, index, np.zeros(1, dtype=int), _displayed_size)
    return VideoInfo(len(index.times), index.fps, width, height, index.end)


def nearest_frames(times: np.ndarray, moments: np.ndarray | float) -> np.ndarray:
    """Index of the frame whose time is nearest to each moment; of two equally near ones, the earlier."""
    middles = (times[1:] + times[:-1]) / 2
    return np.searchsorted(middles, np.asarray(moments) - _TICK, side="left")


def _select_frames(
    path: Source, index: _Index, num_frames: int, fps: float | None, start: float, position: float
) -> np.ndarray:
    """Indices of the frames of a clip; arguments as in `read_clip`."""
    times = index.times
    if num_frames < 1 or (fps is not None and not fps > 0):
        raise UserError(f"num_frames={num_frames}, fps={fps}; give at least 1 frame, and a positive rate or null")
    if start < 0 or not 0 <= position <= 1:
        raise UserError(f"start={start}, position={position}; start is at least 0 seconds, position lies in [0, 1]")
    clip = f"{num_frames} frames at {f'{fps:g}' if fps else 'its own'} fps from {start:g} s"
    video = f"{len(times)} frames at {index.fps:g} fps, {index.end:.3f} s"
    too_short = UserError(
        f"clip '{path}' ({video}) is shorter than asked ({clip}); ask for fewer frames or take it off the list"
    )

    def at_position(starts: np.ndarray) -> Any:
        return starts[min(int(position * len(starts)), len(starts) - 1)]

    if fps is None:
        first = int(nearest_frames(times, start)) if start < index.end else len(times)
        if first + num_frames > len(times):
            raise too_short
        return at_position(np.arange(first, len(times) - num_frames + 1)) + np.arange(num_frames)
    span = (num_frames - 1) / fps
    if start + span > index.end - _TICK:  # the last moment must still be on screen
        raise too_short
    # Elsewhere than at `start`, begin exactly on a frame: between two, jitter in the stamps would give an uneven rhythm.
    starts = times[(times > start - _TICK) & (times < times[-1] - span + _TICK)]
    moment = at_position(starts) if position > 0 and len(starts) else start
    return nearest_frames(times, moment + np.arange(num_frames) / fps)


def _displayed_size(frame: "VideoFrame") -> tuple[int, int]:
    """(height, width) after rotation."""
    return (frame.width, frame.height) if frame.rotation // 90 % 2 else (frame.height, frame.width)


def _to_array(frame: "VideoFrame", convert: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """RGB as displayed, (h, w, 3), scaled to a displayed (height, width) if given; `convert` is a VideoReformatter."""
    scaling: dict[str, Any] = {"threads": 1}
    if size is not None:
        height, width = size[::-1] if frame.rotation // 90 % 2 else size
        scaling = {"height": height, "width": width, "interpolation": "AREA"}
    return np.rot90(convert.reformat(frame, format="rgb24", **scaling).to_ndarray(), frame.rotation // 90 % 4)


def _decode_pyav(
    path: Source, index: _Index, indices: np.ndarray, convert: Callable[["VideoFrame"], Any], strict: bool = False
) -> list[Any]:
    """`convert` of the frames with these indices; `strict` refuses damaged frames between them as well."""
    needed, last = set(indices.tolist()), int(indices.max())
    results: dict[int, Any] = {}
    stamps = index.stamps
    number_of = None if stamps is None else {stamp: number for number, stamp in enumerate(stamps)}
    # From the key frame before the first of them; should the container's seek table be wrong, from the beginning.
    origins = [0] if stamps is None else list(dict.fromkeys([stamps[int(indices.min())], stamps[0]]))
    with _open(path) as (container, stream):
        for origin in origins:
            if stamps is not None:
                container.seek(origin, stream=stream, backward=True)
            for count, frame in enumerate(container.decode(stream)):
                number = count if number_of is None else number_of.get(frame.pts, -1)  # type: ignore[arg-type]
                if frame.is_corrupt and strict:
                    raise _damaged(path, f"frame {number} is corrupt")
                if number in needed and not frame.is_corrupt:
                    results[number] = convert(frame)
                if number >= last:
                    break
            if len(results) == len(needed):
                return [results[number] for number in indices.tolist()]
    raise _damaged(path, f"frame {min(needed - set(results))} of {len(index.times)} is missing")


def _decode_decord(path: Source, index: _Index, indices: np.ndarray) -> np.ndarray | None:
    """The frames with these indices; None: decord refuses the file."""
    import decord

    needed, frames = set(indices.tolist()), {}
    try:
        # fault_tol: by default decord silently repeats frames in place of those that it could not decode.
        reader = decord.VideoReader(_url(path), num_threads=1, fault_tol=1e-9)
        if len(reader) != len(index.times):
            return None
        # In order from the first frame: where decord seeks, it gives wrong frames if the key frame is no fresh start.
        for number in range(max(needed) + 1):
            frame = reader.next()
            if number in needed:
                # Rows are padded to 32 pixels; if that divides by the width, decord takes the padding for more channels.
                height, width = frame.shape[:2]
                frames[number] = frame.asnumpy().reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
        return np.stack([frames[number] for number in indices.tolist()])
    except (decord.DECORDError, RuntimeError, StopIteration):
        return None


def read_clip(
    path: Source,
    num_frames: int,
    fps: float | None = None,
    start: float = 0.0,
    position: float = 0.0,
    decoder: str = "pyav",
) -> np.ndarray:
    """`num_frames` frames, for each k the one nearest in time to `start + k / fps`: uint8 (f, h, w, 3), rotated as displayed.

    Args:
        fps: frames per second of the clip; None takes consecutive frames of the file.
        start: seconds after the first frame.
        position: of the clip between `start` (0) and the end (1). Uniform over [0, 1), it makes every first frame equally likely.
        decoder: "pyav" or "decord". Same bytes from both for 8-bit video, except for 4:2:0 of odd size, which H.264 cannot hold.

    Raises:
        UserError: a file that is missing, empty, damaged, without video, or too short; a value out of range.
    """
    from av.video.reformatter import VideoReformatter

    check_choice("decoder", decoder, DECODERS)
    index = _read_index(path)
    indices = _select_frames(path, index, num_frames, fps, start, position)
    frames = _decode_decord(path, index, indices) if decoder == "decord" else None
    if frames is not None:
        return frames
    # If decord refuses a file, PyAV says what is wrong with it, or reads it to the same bytes.
    convert = VideoReformatter()
    return np.stack(_decode_pyav(path, index, indices, lambda frame: _to_array(frame, convert)))


def survey(
    path: Source, size: tuple[int, int], fps: float, max_frames: int
) -> tuple[VideoInfo, np.ndarray, np.ndarray]:
    """Properties of a video, and its first `max_frames` frames at `fps`, scaled to `size` (height, width): times (n,), uint8 (n, h, w, 3).

    Raises:
        UserError: as `read_clip`, and if any frame between them is damaged.
    """
    from av.video.reformatter import VideoReformatter

    convert = VideoReformatter()
    index = _read_index(path)
    moments = np.arange(0, index.times[-1] + _TICK, 1 / fps)
    indices = np.unique(nearest_frames(index.times, moments))[:max_frames]
    results = _decode_pyav(
        path, index, indices, lambda frame: (_to_array(frame, convert, size), _displayed_size(frame)), strict=True
    )
    height, width = results[-1][1]
    info = VideoInfo(len(index.times), index.fps, width, height, index.end)
    return info, index.times[indices], np.stack([frame for frame, _ in results])


def read_image(path: Source) -> np.ndarray:
    """A picture as a clip of one frame, uint8 (1, h, w, 3), as `open_image` reads it."""
    from microcinema.data.images import open_image

    return np.array(open_image(path))[None]
