"""When each frame of a video file is shown, and in what shape: what a decoder shows that reads the file from its beginning, as displayed.

MP4 and Matroska store the time of every packet. Where each packet is one shown frame, as they demand for some codecs and the first frames
confirm, frames are timed without decoding and found by seeking. All other files are decoded to be timed.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from microcinema.utils.errors import UserError

if TYPE_CHECKING:
    import av

_FORMATS = (
    "apng,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,vc1,yuv4mpegpipe"
)
_INDEXED_FORMATS = ("mov,mp4", "matroska")  # beginnings of FFmpeg's names
_INDEXED_CODECS = ("av1", "h264", "hevc")

PathLike = str | os.PathLike[str]
Size = tuple[int, int]  # height, width
_Stamps = tuple[int | None, int | None, int]  # presentation and decoding time stamp; duration, 0: unknown


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
    """Frames, mean frames per second, size as displayed, and seconds from the first frame to the end of a video."""

    num_frames: int
    fps: float
    width: int
    height: int
    duration: float


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video in the order in which they are shown.

    Attributes:
        times: seconds after the first frame, ascending, (n,).
        stored: size of the first frame in the file.
        square: the same with square pixels, before it is turned.
        turn: how frames are turned: whether they are transposed, then the steps, 1 or -1, in which rows and columns are taken.
        stamps: time stamps by which frames are recognized; None: they are counted from the beginning of the file.
        is_simple: progressive 4:2:0 of 8 bits and even size, stored as displayed, in the only video stream of a file with stamps.
    """

    info: VideoInfo
    times: np.ndarray
    stored: Size
    square: Size
    turn: tuple[bool, int, int]
    stamps: list[int] | None
    is_simple: bool


def url(path: Source) -> str:
    """The name under which FFmpeg opens a file."""
    if isinstance(path, TarMember):
        return f"subfile,,start,{path.offset},end,{path.offset + path.size},,:file:{path.archive}"
    return f"file:{path}"  # a name may have a colon


def damaged(path: Source, reason: Any) -> UserError:
    """The error of a file that does not decode."""
    what = "damaged, truncated or not a video; replace it or take it off the list"
    return UserError(f"video file '{path}' cannot be decoded: {what} ({reason})")


@contextmanager
def open_video(path: Source) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    """Opens the video stream that players show, of formats that hold it themselves; any error of FFmpeg becomes a UserError that names the file."""
    import av
    from av.stream import Disposition

    file = Path(path.archive if isinstance(path, TarMember) else path)
    if not file.is_file():
        raise UserError(f"video file '{file}' does not exist; check the path")
    if (path.size if isinstance(path, TarMember) else file.stat().st_size) == 0:
        raise UserError(f"video file '{path}' is empty (0 bytes); fetch or write it again")
    try:
        with av.open(url(path), options={"format_whitelist": _FORMATS}, metadata_errors="ignore") as container:
            stream: Any = container.streams.best("video")
            if stream is None or stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails):
                raise UserError(f"file '{path}' has no video stream; give a video file")
            if stream.codec_context is None:
                raise damaged(path, "FFmpeg has no decoder for it")
            if stream.metadata.get("alpha_mode") == "1":  # in WebM, as a second video that FFmpeg leaves out
                raise UserError(f"video file '{path}' has transparency that cannot be decoded; convert it to mp4")
            stream.codec_context.thread_count = 1  # data-loader workers are the parallelism
            yield container, stream
    except (av.FFmpegError, EOFError) as error:
        raise damaged(path, getattr(error, "strerror", None) or error) from None


def decode(packet: "av.Packet[Any]", started: bool) -> list["av.VideoFrame"]:
    """The frames that a packet lets the decoder show. Until it has `started`, errors are passed over: recordings begin between key frames."""
    import av

    try:
        return packet.decode()  # type: ignore[return-value]
    except av.FFmpegError:
        if started:
            raise
        return []


def read_index(path: Source, by_decoding: bool = False) -> VideoIndex:
    """Times the frames of a video by its packets, or where these do not tell, by decoding them all. A UserError if the file is missing,
    damaged, without video, changes its shape, or is turned by another than a right angle."""
    packets: list[_Stamps] = []
    shown: list[_Stamps] = []
    sequence_headers: set[bytes] = set()
    looks_damaged, first = False, None
    with open_video(path) as (container, stream):
        codec, container_format = stream.codec_context.codec.canonical_name, container.format.name
        by_decoding = by_decoding or codec not in _INDEXED_CODECS or not container_format.startswith(_INDEXED_FORMATS)
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:  # by an edit list
                packets.append((packet.pts, packet.dts, packet.duration or 0))
                if packet.is_keyframe and not by_decoding:
                    sequence_headers.add(_sequence_header(packet, codec))
            looks_damaged = looks_damaged or (first is not None and packet.is_corrupt)
            if by_decoding or len(shown) < 2:  # two frames confirm the packets: they tell frames from fields
                for frame in decode(packet, first is not None):
                    first = first or frame
                    check_frame(path, frame, (first.height, first.width))
                    pts = None if container_format == "avi" else frame.pts  # AVI stores none, FFmpeg guesses
                    shown.append((pts, frame.dts, frame.duration or 0))
        entries = stream.index_entries  # as the header promises; a truncated file ends before its last entry
        if len(entries) and entries[-1].pos + entries[-1].size > container.size:
            raise damaged(path, "its header promises more frames")
        if first is None:
            raise UserError(f"video file '{path}' holds no frames that decode; replace it or take it off the list")
        rate, time_base = float(stream.average_rate or stream.guessed_rate or 0), float(stream.time_base or 0)
        stored, turn = (first.height, first.width), _turn(path, first)
        square = first.height, max(1, round(first.width * (stream.sample_aspect_ratio or 1)))
        is_simple = stored == square and turn == (False, 1, 1) and len(container.streams.video) == 1
    if looks_damaged:
        _check_soundness(path)
    stamps = None
    if not by_decoding:
        stamps = sorted(packet[0] for packet in packets if packet[0] is not None)
        confirmed = len(set(stamps)) == len(packets) and stamps[: len(shown)] == [s[0] for s in shown]
        if len(sequence_headers) > 1 or not confirmed:
            return read_index(path, by_decoding=True)
        shown = sorted(packets)
    times, end = _times(path, shown, rate, time_base)
    mean_rate = len(times) / end
    fps = rate if abs(rate - mean_rate) < 0.02 * mean_rate else mean_rate  # stamps may be rounded
    info = VideoInfo(len(times), fps, *(square if turn[0] else square[::-1]), end)
    is_simple &= stamps is not None and not first.interlaced_frame
    is_simple &= first.format.name in ("yuv420p", "yuvj420p") and stored[0] % 2 == stored[1] % 2 == 0
    return VideoIndex(info, times, stored, square, turn, stamps, is_simple)


def _check_soundness(path: Source) -> None:
    """Refuses errors that the decoder conceals. Recordings that were joined have none, only packets that look incomplete."""
    with open_video(path) as (container, stream):
        stream.codec_context.options = {"err_detect": "explode"}
        started = False
        for packet in container.demux(stream):
            started = bool(decode(packet, started)) or started


def _sequence_header(packet: "av.Packet[Any]", codec: str) -> bytes:
    """The sequence header in a key packet of MP4 or Matroska, which says the size of the frames that follow; empty: it has none."""
    data, at = bytes(packet), 0
    if codec == "av1":
        return data[: 2 + data[1]] if data[0] >> 3 & 15 == 1 else b""
    while at + 4 < len(data):
        size, unit = int.from_bytes(data[at : at + 4], "big"), data[at + 4]
        if (unit & 31 == 7) if codec == "h264" else (unit >> 1 & 63 == 33):
            return data[at : at + 4 + size]
        at += 4 + size
    return b""


def check_frame(path: Source, frame: "av.VideoFrame", stored: Size) -> None:
    """Refuses damaged frames, and those of another aspect ratio than the first one's; others of another size are scaled."""
    if frame.is_corrupt:
        raise damaged(path, "a frame is corrupt")
    if abs(frame.width * stored[0] / (frame.height * stored[1]) - 1) > 0.02:
        change = f"from {stored[1]}x{stored[0]} to {frame.width}x{frame.height}"
        raise UserError(f"video file '{path}' changes its shape {change}; cut it there or take it off the list")


def _turn(path: Source, frame: "av.VideoFrame") -> tuple[bool, int, int]:
    """`VideoIndex.turn` by the display matrix; ISO 14496-12, 6.2.2: (x, y) is displayed at (a x + c y, b x + d y)."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20]) if matrix is not None else (1, 0, 0, 0, 1)
    transposed = abs(b) + abs(c) > abs(a) + abs(d)
    rows, columns, *others = (b, c, a, d) if transposed else (d, a, b, c)
    if max(map(abs, others)) > 0.02 * min(abs(rows), abs(columns)):  # a degree, as in FFmpeg
        raise UserError(f"video file '{path}' is to be turned by another than a right angle; convert it")
    return transposed, -1 if rows < 0 else 1, -1 if columns < 0 else 1


def _times(path: Source, shown: list[_Stamps], rate: float, time_base: float) -> tuple[np.ndarray, float]:
    """Seconds after the first frame, (n,), and until the last one disappears: by presentation stamps, or decoding stamps where these do not ascend.

    A frame without a stamp, or for which time runs backwards, follows at the rate.
    """
    gaps, decoding_gaps, _ = np.diff(np.array(shown, dtype=float).T)  # NaN where a stamp is missing
    if not (gaps > 0).all() and (decoding_gaps > 0).any() and not (decoding_gaps <= 0).any():
        gaps = decoding_gaps
    step = 1 / rate / time_base if rate > 0 < time_base else float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 0
    if not step * time_base > 0:
        raise UserError(f"video file '{path}' stores neither time stamps nor a frame rate; convert it to mp4")
    times = np.cumsum(np.r_[0.0, np.where(gaps > 0, gaps, step)]) * time_base
    return times, float(times[-1] + (shown[-1][2] or step) * time_base)
