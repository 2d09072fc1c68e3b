"""Writing frames, uint8 (f, h, w, 3) RGB, as videos, GIFs and contact sheets."""

import itertools
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from microcinema.data.video_index import PathLike
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path

# Of a contact sheet, in pixels: space round and between clips, round and between frames, height of a line.
_SPACE, _GAP, _LINE = 4, 4, 18
_PALETTE_PIXELS = 2**16  # of a GIF's frames: as many are enough to choose the palette from
_MARK = (225, 0, 110)  # color of the border round a key frame


def _check(frames: np.ndarray, fps: float = 1.0) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise UserError(f"frames are {frames.dtype} {frames.shape}; give uint8 (frames, height, width, 3), not empty")
    if not fps > 0:
        raise UserError(f"fps={fps}; give a positive number of frames per second")
    return np.ascontiguousarray(frames)


def write_video(path: PathLike, frames: np.ndarray, fps: float, crf: int = 18, lossless: bool = False) -> None:
    """Writes H.264 with exactly the frames' size, count and rate; the same frames always give the same bytes.

    Even sizes are stored as yuv420p, which plays everywhere. H.264 has no 4:2:0 of odd size, so odd sizes are stored as yuv444p rather than
    rescaled or padded; some players refuse that.

    Args:
        crf: x264's constant rate factor, 0 to 51, lower is better; 18 is near transparent.
        lossless: x264 in RGB, from which `read_clip` returns exactly these frames; most browsers cannot play it.

    Raises:
        UserError: other frames, a value out of range, a folder that cannot be written.
    """
    frames = _check(frames, fps)
    if not 0 <= crf <= 51:
        raise UserError(f"crf={crf}; give a number from 0 (best) to 51")
    height, width = frames.shape[1:3]
    rate = Fraction(fps).limit_denominator(1001)
    with atomic_path(path) as temporary:
        # Index first, for browsers; and a clock that counts whole frames, otherwise durations are rounded to milliseconds.
        mp4 = {"movflags": "+faststart", "movie_timescale": str(rate.numerator)} if temporary.suffix == ".mp4" else {}
        # Same bytes: x264's output depends on its number of threads, and its macroblock tree reads uninitialized memory.
        options = {"crf": str(0 if lossless else crf), "mbtree": "0"}
        with av.open(str(temporary), "w", options=mp4) as container:
            stream = container.add_stream("libx264rgb" if lossless else "libx264", rate=rate, options=options)
            stream.codec_context.thread_count = 1
            stream.width, stream.height = width, height
            stream.pix_fmt = "rgb24" if lossless else "yuv444p" if height % 2 or width % 2 else "yuv420p"
            if not lossless:
                stream.codec_context.colorspace = 5  # BT.601, as swscale converts: untagged, players guess by size
            for number, array in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame.pts, frame.time_base = number, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def write_gif(path: PathLike, frames: np.ndarray, fps: float) -> None:
    """Writes an endlessly repeating GIF with one palette for all frames.

    GIF counts in hundredths of a second: delays are rounded so that the total length is kept, and none is under 0.02 s (50 fps).
    """
    frames = _check(frames, fps)
    count, height, width = frames.shape[:3]
    # All frames as one tall picture: one palette for the clip, so that a still background does not flicker.
    tall, palette = Image.fromarray(frames.reshape(count * height, width, 3)), None
    if (step := count * height * width // _PALETTE_PIXELS) > 1:
        # k-means over all pixels takes minutes for a long clip. An odd step takes pixels of all columns.
        palette = Image.fromarray(frames.reshape(1, -1, 3)[:, :: step | 1]).quantize(256, kmeans=1)
    tall = tall.quantize(256, kmeans=1, palette=palette, dither=Image.Dither.NONE)
    images = [tall.crop((0, k * height, width, (k + 1) * height)) for k in range(count)]
    times = [round(100 * k / fps) for k in range(count + 1)]
    delays = [10 * max(2, after - before) for before, after in itertools.pairwise(times)]
    with atomic_path(path) as temporary:
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], duration=delays, loop=0)


def write_contact_sheet(
    path: PathLike,
    clips: np.ndarray | Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    below: bool = False,
    keyframes: Sequence[int | Sequence[int] | None] | None = None,
) -> None:
    """Writes a PNG with the frames of one or several clips, one clip below the other.

    Args:
        captions: a text above each clip, or below it, broken into lines.
        columns: frames in a row; None: all frames of a clip.
        keyframes: index of each clip's key frame, or of several, which get a border; None: there is none, or it is not known.
    """
    clips = [_check(clip) for clip in ([clips] if isinstance(clips, np.ndarray) else clips)]
    captions = [""] * len(clips) if captions is None else captions
    keyframes = [None] * len(clips) if keyframes is None else keyframes
    if not clips or {len(captions), len(keyframes)} != {len(clips)} or (columns is not None and columns < 1):
        sheet = f"contact sheet of {len(clips)} clips, {len(captions)} captions, {len(keyframes)} key frames, columns={columns}"
        raise UserError(f"{sheet}; give at least 1 clip, captions and key frames of all or none, at least 1 column")
    rows = zip(clips, captions, keyframes, strict=True)
    strips = [_strip(clip, caption, columns, below, keyframe) for clip, caption, keyframe in rows]
    height = sum(strip.height + _SPACE for strip in strips) + _SPACE
    page = Image.new("RGB", (max(strip.width for strip in strips) + 2 * _SPACE, height), "white")
    top = _SPACE
    for strip in strips:
        page.paste(strip, (_SPACE, top))
        top += strip.height + _SPACE
    with atomic_path(path) as temporary:
        page.save(temporary, format="PNG")


def _strip(
    clip: np.ndarray, caption: str, columns: int | None, below: bool, keyframe: int | Sequence[int] | None
) -> Image.Image:
    """The frames of a clip with its caption and a margin of `_GAP`, as an image."""
    font = ImageFont.load_default(size=14)
    count, height, width = clip.shape[:3]
    columns = min(columns or count, count)
    sheet_width = max(columns * (width + _GAP) - _GAP, 160)
    lines: list[str] = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= sheet_width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    text_height, frames_height = _LINE * len(lines) + _GAP * bool(lines), -(-count // columns) * (height + _GAP) - _GAP
    text_top, frames_top = (frames_height + 2 * _GAP, _GAP) if below else (_GAP, text_height + _GAP)
    sheet = Image.new("RGB", (sheet_width + 2 * _GAP, text_height + frames_height + 2 * _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for k, line in enumerate(lines):
        draw.text((_GAP, text_top + _LINE * k), line, fill="black", font=font)
    for k, frame in enumerate(clip):
        left, top = _GAP + k % columns * (width + _GAP), frames_top + k // columns * (height + _GAP)
        if k == keyframe or (
            isinstance(keyframe, Sequence) and k in keyframe
        ):  # on the white between the frames, so that it shows beside any picture and covers none
            draw.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), outline=_MARK, width=2)
        sheet.paste(Image.fromarray(frame), (left, top))
    return sheet
