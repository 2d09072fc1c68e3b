"""The HTML report of a measurement: numbers, the curve of FVD over N, published values, videos."""

import base64
import csv
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from microcinema.data.video_writer import write_video
from microcinema.evaluation.measures import KEYFRAME_PSNR, KEYFRAME_SSIM, Measure, tables
from microcinema.utils.templates import write_page

TEMPLATE = Path(__file__).with_name("templates") / "report.html.jinja"
RESULTS_FILE, REPORT_FILE = "results.json", "report.html"
PUBLISHED_FILE = Path(__file__).parent / "published.csv"
WARNING = "Protocols differ from paper to paper and are seldom written down whole: an order among these numbers is weak evidence."

MEASURES = (
    Measure("fvd", "FVD", "Fréchet distance of the video detector's features", "", "lower", 2),
    Measure("kvd", "KVD", "kernel distance of the same features", "", "lower", 4),
    Measure("jedi", "JEDi", "100 times the polynomial MMD of V-JEPA's features", "", "lower"),
    Measure("is", "IS", "Inception score of C3D's classes", "", "higher", 2),
    Measure("clipsim", "CLIPSIM", "CLIP cosine of text and frame", "", "higher", 4),
    Measure("frame_fid", "Frame FID", "Fréchet distance of single frames", "", "lower", 2),
    Measure(
        "clip_consistency", "CLIP consistency", "CLIP cosine of neighbouring frames; a still video scores 1", "", "", 4
    ),
    Measure("motion_magnitude", "Motion magnitude", "mean optical flow, pixels a frame; near 0: still videos", "px"),
    KEYFRAME_PSNR,
    KEYFRAME_SSIM,
)
PER_CLIP = ("clipsim", "clip_consistency", "motion_magnitude", "psnr", "ssim")
_WIDTH, _HEIGHT, _MARGIN = 640, 300, 56  # of the figure, pixels
_VIDEO_CRF = 20


@dataclass(frozen=True)
class Picture:
    """A clip to show: its caption, `frames` uint8 (f, h, w, 3) and key frame, if there is one, and why it is shown."""

    caption: str
    frames: np.ndarray
    keyframe: np.ndarray | None
    fps: float
    note: str = ""


def measures_of(values: Mapping[str, Any], detectors: Mapping[str, Any]) -> list[Measure]:
    """The measures that have values; distances of VideoMAE's features under their own name, since they compare with none of I3D's."""
    debiased = ("fvd", "kvd") if detectors.get("VideoFeatures", {}).get("detector") == "videomae" else ()
    return [
        replace(measure, label=f"cd-{measure.label}") if measure.key in debiased else measure
        for measure in MEASURES
        if measure.key in values
    ]


def choose(results: Mapping[str, Any], count: int = 12, extremes: int = 3) -> dict[int, str]:
    """Numbers of clips to show, `count` evenly spaced, and by each measure of single clips that has a better way the best and the worst
    `extremes`, with notes that say so."""
    chosen: dict[int, str] = {}
    clips = results["clips"]
    for measure in (Measure(**entry) for entry in results["measures"]):
        values = [clip["measures"].get(measure.key, np.nan) for clip in clips]
        found = int(np.isfinite(values).sum())
        if measure.better and found > 2 * extremes:
            order = np.argsort(values)[:found].tolist()
            best = order[::-1] if measure.better == "higher" else order
            for which, picks in (("worst", best[::-1]), ("best", best)):
                for pick in picks[:extremes]:
                    note = f"{which} by {measure.label}: {measure.format(values[pick])}"
                    chosen[pick] = f"{chosen[pick]}; {note}" if pick in chosen else note
    even = np.unique(np.linspace(0, len(clips) - 1, count).round().astype(int)).tolist()
    return chosen | {index: "" for index in even if index not in chosen}


def rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Label, meaning, value, details and the value of real clips, for every measure in the results."""
    table = []
    for measure in (Measure(**entry) for entry in results["measures"]):
        if measure.key in results["values"]:
            entry = results["values"][measure.key]
            better = f"; {measure.better} is better" if measure.better else ""
            row = {"label": measure.label, "title": measure.title, "meaning": f"{measure.meaning}{better}"}
            row |= {"value": measure.number(entry["value"]), "detail": _detail(measure, entry)}
            table.append(row | {"real": measure.number(entry["real"]) if "real" in entry else ""})
    return table


def _detail(measure: Measure, entry: Mapping[str, Any]) -> str:
    number = measure.number
    if "curve" in entry:
        parts = [f"N = {entry['num_generated']} against {entry['num_real']}"]
        parts.append(f"95 % interval {number(entry['low'])} to {number(entry['high'])}")
        if entry["extrapolated"] is not None:
            parts.append(f"at infinite N {number(entry['extrapolated'])}")
        if entry["floor"] is not None:
            parts.append(f"real against real {number(entry['floor'])} at N = {entry['floor_count']}")
        return ", ".join(parts)
    if measure.key == "is":
        return f"± {entry['std']:.2f} over {entry['splits']} splits"
    return f"{number(entry['low'])} to {number(entry['high'])}" if "low" in entry else ""


def model_name(results: Mapping[str, Any]) -> str:
    """Of the pipeline or the folder of videos that was measured."""
    made = results.get("model") or results["generated"]
    return Path(made.get("pipeline") or made["folder"]).stem


def text_table(results: Mapping[str, Any]) -> str:
    """For a terminal: a line per measure with the protocol's identifier, then everything missing or doubtful."""
    identifier, lines = results["protocol"]["identifier"], []
    for row in rows(results):
        more = ", ".join(filter(None, (row["detail"], f"real {row['real']}" if row["real"] else "")))
        lines.append(f"{row['label']:28} {row['value']:>10}  [{identifier}]  {more}".rstrip())
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
            "note": picture.note,
            "video": embedded_video(picture.frames, picture.fps),
            "keyframe": None if picture.keyframe is None else embedded_picture(picture.keyframe),
        }
        for picture in pictures
    ]
    measures, table = (Measure(**entry) for entry in results["measures"]), rows(results)
    curves = [(measure, found) for measure in measures if "curve" in (found := results["values"].get(measure.key, {}))]
    chart = _chart(*curves[0]) if curves else None
    copies = tables(["", *(row["title"] for row in table)], [[model_name(results), *(row["value"] for row in table)]])
    index = results["generated"].get("keyframe_index")
    others = results["protocol"]["dataset"] in ("ucf101", "msrvtt", "folder")
    values = {
        "model": model_name(results),
        "keyframe_index": index,
        "rows": table,
        "tables": copies,
        "published": published() if others else [],
    }
    write_page(path, TEMPLATE, results=results, chart=chart, warning=WARNING, pictures=videos, **values)


def _chart(measure: Measure, fvd: Mapping[str, Any]) -> dict[str, Any] | None:
    """SVG coordinates of the curve of a distance over 1/N, and of the line that extrapolates it to infinite N."""
    if len(fvd["curve"]) < 2:
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
        "label": measure.label,
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _MARGIN,
        "right": _WIDTH - _MARGIN,
        "bottom": _HEIGHT - _MARGIN,
        "points": [{"x": x(1 / n), "y": y(v), "n": int(n), "value": measure.number(v)} for n, v in curve],
        "line": [y(start), x(1 / counts.min()), y(start + slope / counts.min())],
        "floor": None if fvd["floor"] is None else {"y": y(fvd["floor"]), "value": measure.number(fvd["floor"])},
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
