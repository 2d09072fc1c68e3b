"""Video and picture files to frames, uint8 (f, h, w, 3) RGB arrays.

Frames are selected by the time at which they are shown (data/video_index.py), so variable frame rates come out right. Both decoders convert
colors with swscale's plain 8-bit path and so give the same bytes (tests/data/test_video_reader.py).
"""

import contextlib
from typing import Any

import numpy as np

from microcinema.data import video_index
from microcinema.data.video_index import Size, Source, TarMember, VideoIndex, VideoInfo, read_index
from microcinema.utils.errors import UserError, check_choice

DECODERS = ("pyav", "decord")
VIDEOS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_TICK = 1e-6  # seconds; times closer than this are equal, so that float rounding never decides which frame is nearest


def is_image(source: Source) -> bool:
    """Whether a file is a picture, by its name."""
    name = source.name if isinstance(source, TarMember) else str(source)
    return name.lower().endswith(IMAGES)


def probe(path: Source) -> VideoInfo:
    """Counts and times the frames of a video; a UserError if the file is missing, damaged or without video."""
    return read_index(path).info


def nearest_frames(times: np.ndarray, moments: np.ndarray | float) -> np.ndarray:
    """Index of the frame whose time is nearest to each moment; of two equally near ones, the earlier."""
    middles = (times[1:] + times[:-1]) / 2
    return np.searchsorted(middles, np.asarray(moments) - _TICK, side="left")


def _select_frames(
    path: Source, index: VideoIndex, num_frames: int, fps: float | None, start: float, position: float
) -> np.ndarray:
    """Indices of the frames of a clip; arguments as in `read_clip`."""
    times = index.times
    if num_frames < 1 or (fps is not None and not fps > 0):
        raise UserError(f"num_frames={num_frames}, fps={fps}; give at least 1 frame, and a positive rate or null")
    if start < 0 or not 0 <= position <= 1:
        raise UserError(f"start={start}, position={position}; start is at least 0 seconds, position lies in [0, 1]")
    clip = f"{num_frames} frames at {f'{fps:g}' if fps else 'its own'} fps from {start:g} s"
    video = f"{len(times)} frames at {index.info.fps:g} fps, {index.info.duration:.3f} s"
    too_short = UserError(
        f"clip '{path}' ({video}) is shorter than asked ({clip}); ask for fewer frames or take it off the list"
    )

    def at_position(starts: np.ndarray) -> Any:
        return starts[min(int(position * len(starts)), len(starts) - 1)]

    if fps is None:
        first = int(nearest_frames(times, start)) if start < index.info.duration else len(times)
        if first + num_frames > len(times):
            raise too_short
        return at_position(np.arange(first, len(times) - num_frames + 1)) + np.arange(num_frames)
    span = (num_frames - 1) / fps
    if start + span > index.info.duration - _TICK:  # the last moment must still be on screen
        raise too_short
    # Elsewhere than at `start`, begin exactly on a frame: between two, jitter in the stamps would give an uneven rhythm.
    starts = times[(times > start - _TICK) & (times < times[-1] - span + _TICK)]
    moment = at_position(starts) if position > 0 and len(starts) else start
    return nearest_frames(times, moment + np.arange(num_frames) / fps)


def _to_array(frame: Any, index: VideoIndex, convert: Any, size: Size | None = None) -> np.ndarray:
    """RGB as displayed, (h, w, 3), of the video's size or another; from a VideoFrame, by a VideoReformatter."""
    transposed, rows, columns = index.turn
    height, width = index.square if size is None else size[::-1] if transposed else size
    scaling: dict[str, Any] = {"threads": 1}
    if (height, width) != (frame.height, frame.width):
        scaling |= {"height": height, "width": width, "interpolation": "AREA" if size else "BICUBIC"}
    pixels = convert.reformat(frame, format="rgb24", **scaling).to_ndarray()
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        alpha = convert.reformat(frame, format="rgba", **scaling).to_ndarray()[..., 3:].astype(int)
        pixels = ((pixels * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)  # over white, as pictures
    return (pixels.swapaxes(0, 1) if transposed else pixels)[::rows, ::columns]


def _decode_from(
    origin: int | None, path: Source, index: VideoIndex, indices: np.ndarray, size: Size | None, skips: bool = False
) -> Any:
    """The frames with these indices, decoded from the key frame before a time stamp, or from the beginning of the file.

    `skips`: not the others of H.264 to which no frame refers. In HEVC, frames of higher temporal layers may refer to those marked so.
    """
    from av.video.reformatter import VideoReformatter

    needed, first, last = set(indices.tolist()), int(indices.min()), int(indices.max())
    number_of: dict[int | None, int] = {stamp: number for number, stamp in enumerate(index.stamps or [])}
    results: dict[int, np.ndarray] = {}
    count, convert = 0, VideoReformatter()
    with video_index.open_video(path) as (container, stream):
        if origin is not None:
            container.seek(origin, stream=stream, backward=True)
        skips = skips and stream.codec_context.name == "h264"
        order = iter(sorted(needed) if skips else range(first, last + 1))
        expected = next(order)
        for packet in container.demux(stream):
            if skips:
                is_needed = number_of.get(packet.pts, -1) in needed
                stream.codec_context.skip_frame = "DEFAULT" if is_needed else "NONREF"
            for frame in video_index.decode(packet, count > 0):
                if skips and frame.interlaced_frame:  # its fields may be packets of their own
                    return _decode_from(origin, path, index, indices, size)
                number = count if index.stamps is None else number_of.get(frame.pts, -1)
                count += 1
                if first <= number <= last:
                    video_index.check_frame(path, frame, index.stored)
                if number != expected:
                    continue
                if number in needed:
                    results[number] = _to_array(frame, index, convert, size)
                if number == last:
                    return np.stack([results[number] for number in indices.tolist()])
                expected = next(order)
    raise video_index.damaged(path, f"frame {expected} of {len(index.times)} is missing")


def _decode_pyav(path: Source, index: VideoIndex, indices: np.ndarray, size: Size | None = None) -> np.ndarray:
    """The frames with these indices, scaled to a displayed size if given; frames between them, to which others refer, have to be sound as well."""
    if index.stamps is not None:
        with contextlib.suppress(UserError):  # key frames may need frames before them, or be marked wrongly
            return _decode_from(index.stamps[int(indices.min())], path, index, indices, size, skips=True)
    return _decode_from(None, path, index, indices, size)


def _decode_decord(path: Source, index: VideoIndex, indices: np.ndarray) -> np.ndarray | None:
    """The frames with these indices; None: decord refuses the file."""
    import decord

    needed, frames = set(indices.tolist()), {}
    try:
        # fault_tol: by default decord silently repeats frames in place of those that it could not decode.
        reader = decord.VideoReader(video_index.url(path), num_threads=1, fault_tol=1e-9)
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
    except Exception:  # decord raises more than its own ones
        return None


def read_clip(
    path: Source,
    num_frames: int,
    fps: float | None = None,
    start: float = 0.0,
    position: float = 0.0,
    decoder: str = "pyav",
) -> np.ndarray:
    """`num_frames` frames, for each k the one nearest in time to `start + k / fps`: uint8 (f, h, w, 3), as displayed.

    That is with square pixels, rotated and mirrored, over white where transparent, and of the first frame's size. Interlaced frames stay so.

    Args:
        fps: frames per second of the clip; None takes consecutive frames of the file.
        start: seconds after the first frame.
        position: of the clip between `start` (0) and the end (1). Uniform over [0, 1), it makes every first frame equally likely.
        decoder: "pyav" or "decord", which reads simple files (`VideoIndex.is_simple`) to the same bytes and leaves all others to PyAV.

    Raises:
        UserError: a file that is missing, empty, damaged, without video, or too short; one whose shape changes or that is turned by another
            than a right angle; a value out of range.
    """
    check_choice("decoder", decoder, DECODERS)
    index = read_index(path)
    indices = _select_frames(path, index, num_frames, fps, start, position)
    # If decord refuses a file, PyAV says what is wrong with it, or reads it to the same bytes.
    frames = _decode_decord(path, index, indices) if decoder == "decord" and index.is_simple else None
    return _decode_pyav(path, index, indices) if frames is None else frames


def survey(path: Source, size: Size, fps: float, max_frames: int) -> tuple[VideoInfo, np.ndarray, np.ndarray]:
    """Properties of a video, and its first `max_frames` frames at `fps`, scaled to `size` (height, width): times (n,), uint8 (n, h, w, 3)."""
    index = read_index(path)
    moments = np.arange(0, index.times[-1] + _TICK, 1 / fps)
    indices = np.unique(nearest_frames(index.times, moments))[:max_frames]
    return index.info, index.times[indices], _decode_pyav(path, index, indices, size)


def read_image(path: Source) -> np.ndarray:
    """A picture as a clip of one frame, uint8 (1, h, w, 3), as `open_image` reads it."""
    from microcinema.data.images import open_image

    return np.array(open_image(path))[None]
