"""Frames to files: videos, GIFs, contact sheets. Frames are `uint8 (f, h, w, 3)` RGB arrays."""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from microcinema.data.video_reader import PathLike
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path


def _checked(frames: np.ndarray) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise UserError(
            f"frames to write are {frames.dtype} {frames.shape}; give uint8 (frames, height, width, 3), none of them 0"
        )
    return np.ascontiguousarray(frames)


def _check_fps(fps: float) -> None:
    if not fps > 0:
        raise UserError(f"fps={fps}; give a positive number of frames per second")


def write_video(path: PathLike, frames: np.ndarray, fps: float, crf: int = 18, lossless: bool = False) -> None:
    """Writes H.264 of exactly the frames' size, count and rate; the same frames always give the same bytes.

    Args:
        path: a name that ends in .mp4 (or another container that holds H.264, such as .mkv).
        frames: uint8 (f, h, w, 3).
        crf: x264's constant rate factor, 0 to 51, lower is better; 18 is near transparent.
        lossless: x264 in RGB: `read_clip` gives back exactly these frames. For measuring; most browsers cannot play it.

    Even sizes are stored as yuv420p, which plays everywhere. 4:2:0 has no odd sizes in H.264, so these are stored as yuv444p rather
    than rescaled or padded; some players refuse that.

    Raises:
        UserError: frames of another kind, a value out of range, a folder that cannot be written.
    """
    import av

    frames = _checked(frames)
    _check_fps(fps)
    if not 0 <= crf <= 51:
        raise UserError(f"crf={crf}; give a number from 0 (best) to 51")
    height, width = frames.shape[1:3]
    rate = Fraction(fps).limit_denominator(1001)
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", options=_mp4_options(temporary, rate)) as container,
    ):
        # Same frames, same bytes: x264's output depends on its number of threads, and its macroblock tree reads memory that nobody wrote.
        options = {"crf": str(0 if lossless else crf), "mbtree": "0"}
        stream = container.add_stream("libx264rgb" if lossless else "libx264", rate=rate, options=options)
        stream.codec_context.thread_count = 1
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb24" if lossless else "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
        if not lossless:
            stream.codec_context.colorspace = (
                5  # BT.601, which swscale uses below: untagged, players guess by picture size
            )
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _mp4_options(path: Path, rate: Fraction) -> dict[str, str]:
    """Index first, so that a browser starts at once; and a clock that counts whole frames, else durations are rounded to milliseconds."""
    return {"movflags": "+faststart", "movie_timescale": str(rate.numerator)} if path.suffix == ".mp4" else {}


def write_gif(path: PathLike, frames: np.ndarray, fps: float) -> None:
    """Writes an endlessly repeating GIF with one palette, fitted to all of its frames.

    GIF counts in hundredths of a second: each delay is rounded so that the whole keeps its length, and none is under 0.02 s (50 fps).
    """
    from PIL import Image

    frames = _checked(frames)
    _check_fps(fps)
    count, height, width = frames.shape[:3]
    # All frames as one tall picture: one palette for the clip, so that a still background does not flicker.
    tall = Image.fromarray(frames.reshape(count * height, width, 3)).quantize(256, kmeans=1, dither=Image.Dither.NONE)
    images = [tall.crop((0, k * height, width, (k + 1) * height)) for k in range(count)]
    moments = [round(100 * k / fps) for k in range(count + 1)]
    delays = [10 * max(2, after - before) for before, after in itertools.pairwise(moments)]
    with atomic_path(path) as temporary:
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], duration=delays, loop=0)


def write_contact_sheet(
    path: PathLike,
    clips: np.ndarray | Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int = 1,
    smooth: bool = False,
    below: bool = False,
) -> None:
    """Writes a PNG that shows the frames of one clip or several, one clip below the other.

    Args:
        clips: uint8 (f, h, w, 3), or several of these.
        captions: one line of text above each clip, or below it; long ones wrap.
        columns: frames in a row; None puts a whole clip into one row.
        scale: enlarges every frame this many times, by repeating pixels or, if `smooth`, by Lanczos resampling.
    """
    from PIL import Image, ImageDraw, ImageFont

    clips = [_checked(clip) for clip in ([clips] if isinstance(clips, np.ndarray) else clips)]
    if (
        not clips
        or scale < 1
        or (columns is not None and columns < 1)
        or (captions is not None and len(captions) != len(clips))
    ):
        got = f"{len(clips)} clips, {'no' if captions is None else len(captions)} captions, columns={columns}, scale={scale}"
        raise UserError(
            f"contact sheet of {got}; give at least 1 clip, a caption for each or none, columns and scale at least 1"
        )
    gap, font = 4, ImageFont.load_default(size=14)
    resample = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST

    def strip(clip: np.ndarray, caption: str) -> Image.Image:
        frames, (height, width) = len(clip), (scale * clip.shape[1], scale * clip.shape[2])
        across = min(columns or frames, frames)
        down = -(-frames // across)
        sheet_width = max(across * (width + gap) - gap, 160)
        text = _wrapped(caption, sheet_width, font)
        words_height, pictures_height = 18 * len(text) + (gap if text else 0), down * (height + gap) - gap
        top, words_top = (0, pictures_height + gap) if below else (words_height, 0)
        sheet = Image.new("RGB", (sheet_width, words_height + pictures_height), "white")
        for row, words in enumerate(text):
            ImageDraw.Draw(sheet).text((0, words_top + 18 * row), words, fill="black", font=font)
        for k, frame in enumerate(clip):
            place = (k % across * (width + gap), top + k // across * (height + gap))
            sheet.paste(Image.fromarray(frame).resize((width, height), resample), place)
        return sheet

    strips = [strip(clip, captions[k] if captions else "") for k, clip in enumerate(clips)]
    margin, space = 8, 12
    size = (max(s.width for s in strips) + 2 * margin, sum(s.height + space for s in strips) - space + 2 * margin)
    page = Image.new("RGB", size, "white")
    top = margin
    for picture in strips:
        page.paste(picture, (margin, top))
        top += picture.height + space
    with atomic_path(path) as temporary:
        page.save(temporary, format="PNG")


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """Breaks a text between words into lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
