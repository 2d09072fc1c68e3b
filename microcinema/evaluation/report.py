"""The HTML report of a zero-shot protocol: numbers, the curve of FVD over N, published values, videos."""

import base64
import csv
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from microcinema.data.video_writer import write_video
from microcinema.utils.templates import write_page

TEMPLATE = Path(__file__).with_name("templates") / "report.html.jinja"
PUBLISHED_FILE = Path(__file__).parent / "published.csv"
WARNING = "Protocols differ from paper to paper and are seldom written down whole: an order among these numbers is weak evidence."

_ROWS = (
    ("fvd", "FVD", "Fréchet distance of the video detector's features", 2, "lower"),
    ("kvd", "KVD", "kernel distance of the same features", 4, "lower"),
    ("is", "IS", "Inception score of C3D's classes", 2, "higher"),
    ("clipsim", "CLIPSIM", "CLIP cosine of text and frame", 4, "higher"),
    ("frame_fid", "Frame FID", "Fréchet distance of single frames", 2, "lower"),
    ("clip_consistency", "CLIP consistency", "CLIP cosine of neighbouring frames; a still video scores 1", 4, ""),
    ("motion_magnitude", "Motion magnitude", "mean optical flow, pixels a frame; near 0: still videos", 3, ""),
    ("psnr", "Key frame, PSNR", "the key frame in the clip against the given one, dB", 1, "higher"),
    ("ssim", "Key frame, SSIM", "the key frame in the clip against the given one", 3, "higher"),
)
_WIDTH, _HEIGHT, _MARGIN = 640, 300, 56  # of the figure, pixels
_VIDEO_CRF = 20


@dataclass(frozen=True)
class Picture:
    """A clip to show: its caption, `frames` uint8 (f, h, w, 3) and key frame, if there is one."""

    caption: str
    frames: np.ndarray
    keyframe: np.ndarray | None
    fps: float


def rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Label, meaning, value, details and the value of real clips, for every measure in the results."""
    table = []
    for key, label, meaning, digits, better in _ROWS:
        if key not in results["values"]:
            continue
        entry = results["values"][key]
        row = {"label": label, "meaning": f"{meaning}; {better} is better" if better else meaning}
        row |= {"value": f"{entry['value']:.{digits}f}", "detail": _detail(key, entry, digits)}
        table.append(row | {"real": f"{entry['real']:.{digits}f}" if "real" in entry else ""})
    return table


def _detail(key: str, entry: Mapping[str, Any], digits: int) -> str:
    if key == "fvd":
        parts = [f"N = {entry['num_generated']} against {entry['num_real']}"]
        parts.append(f"95 % interval {entry['low']:.2f} to {entry['high']:.2f}")
        if entry["extrapolated"] is not None:
            parts.append(f"at infinite N {entry['extrapolated']:.2f}")
        if entry["floor"] is not None:
            parts.append(f"real against real {entry['floor']:.2f} at N = {entry['floor_count']}")
        return ", ".join(parts)
    if key == "is":
        return f"± {entry['std']:.2f} over {entry['splits']} splits"
    return f"{entry['low']:.{digits}f} to {entry['high']:.{digits}f}" if "low" in entry else ""


def text_table(results: Mapping[str, Any]) -> str:
    """For a terminal: a line per measure with the protocol's identifier, then everything missing or doubtful."""
    identifier, lines = results["protocol"]["identifier"], []
    for row in rows(results):
        more = ", ".join(filter(None, (row["detail"], f"real {row['real']}" if row["real"] else "")))
        lines.append(f"{row['label']:17} {row['value']:>10}  [{identifier}]  {more}".rstrip())
    lines += [f"{names} not measured: {why}" for names, why in results["not_measured"].items()]
    lines += [f"INCOMPLETE: {shortfall}" for shortfall in results["shortfalls"]]
    lines += [f"warning: {warning}" for warning in results["warnings"]]
    return "\n".join(lines)


def published() -> list[dict[str, str]]:
    """Zero-shot values of `method` (arXiv number `arxiv`), as the paper `listed_by` lists them; empty where it lists none."""
    with open(PUBLISHED_FILE, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_report(path: str | os.PathLike[str], results: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    """Writes the page for the content of `results.json`; it loads nothing from elsewhere."""
    videos = [
        {
            "caption": picture.caption,
            "video": embedded_video(picture.frames, picture.fps),
            "keyframe": None if picture.keyframe is None else embedded_picture(picture.keyframe),
        }
        for picture in pictures
    ]
    chart = _chart(results["values"].get("fvd"))
    tables = {"rows": rows(results), "published": published()}
    write_page(path, TEMPLATE, results=results, chart=chart, warning=WARNING, pictures=videos, **tables)


def _chart(fvd: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """SVG coordinates of the curve of FVD over 1/N, and of the line that extrapolates it to infinite N."""
    if fvd is None or len(fvd["curve"]) < 2:
        return None
    counts, values = np.array(fvd["curve"], float).T
    heights = [*values, *(value for value in (fvd["extrapolated"], fvd["floor"]) if value is not None), 0.0]
    low, high = min(heights), max(heights) or 1.0

    def x(inverse: float) -> float:
        return round(_MARGIN + inverse / (1 / counts.min()) * (_WIDTH - 2 * _MARGIN), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _MARGIN + (low - value) / ((high - low) or 1) * (_HEIGHT - 2 * _MARGIN), 1)

    slope, start = np.polyfit(1 / counts, values, 1)
    curve = zip(counts, values, strict=True)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _MARGIN,
        "right": _WIDTH - _MARGIN,
        "bottom": _HEIGHT - _MARGIN,
        "points": [{"x": x(1 / n), "y": y(v), "n": int(n), "value": f"{v:.2f}"} for n, v in curve],
        "line": [y(start), x(1 / counts.min()), y(start + slope / counts.min())],
        "floor": None if fvd["floor"] is None else {"y": y(fvd["floor"]), "value": f"{fvd['floor']:.2f}"},
        "labels": [{"x": x(1 / n), "text": str(int(n))} for n in (counts[-1], counts[0])],
        "ends": [{"y": y(v), "text": f"{v:.4g}"} for v in (low, high)],
    }


def embedded_video(frames: np.ndarray, fps: float) -> str:
    """Base64 of an H.264 mp4 of uint8 (f, h, w, 3)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, frames, fps, crf=_VIDEO_CRF)
        return base64.b64encode(file.read_bytes()).decode()


def embedded_picture(image: np.ndarray) -> str:
    """Base64 of a PNG of uint8 (h, w, 3)."""
    _, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return base64.b64encode(data.tobytes()).decode()
