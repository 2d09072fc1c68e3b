"""The report of `prepare check`: a self-contained page with the number of rejected clips and the reasons, histograms and thumbnails."""

import base64
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from microcinema.data.quality import ClipSurvey
from microcinema.utils.templates import write_page

TEMPLATE = Path(__file__).with_name("templates") / "quality_report.html.jinja"
_BINS = 40
_MAX_THUMBNAILS = 24  # of each verdict
_MAX_ROWS = 200  # of the tables of broken clips and of duplicates
_HEIGHT = 90  # of a thumbnail, pixels
HISTOGRAMS = {
    "duration": "seconds",
    "num_frames": "frames",
    "fps": "frames per second",
    "width": "width, pixels",
    "height": "height, pixels",
    "motion": "motion: mean difference of neighboring frames, levels of 255",
    "watermark": "watermark: correlation with the edges that the clips share",
}


def count_reasons(table: pa.Table) -> dict[str, int]:
    """Clips rejected for each reason, most frequent first; one clip may have several."""
    reasons = table.column("rejected_for").drop_null().to_pylist()
    return dict(Counter(reason for text in reasons for reason in text.split(", ")).most_common())


def histogram(values: np.ndarray) -> dict[str, Any] | None:
    """Counts in 40 bins between the first and the 99th percentile, outliers in the outermost; None: no value."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = (float(edge) for edge in np.percentile(values, [1, 99]))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    bins, _ = np.histogram(values.clip(low, high), bins=_BINS, range=(low, high))
    return {
        "bars": [float(count) / bins.max() for count in bins],
        "low": low,
        "high": high,
        "median": float(np.median(values)),
        "most": int(bins.max()),
    }


def encode_thumbnail(survey: ClipSurvey, cut: float | None) -> bytes:
    """A JPEG of the first, middle and last frame at the clip's aspect ratio; with a cut (seconds), of the first frame and of both its sides."""
    count = len(survey.frames)
    indices = [0, count // 2, count - 1]
    if cut is not None:
        after = int(np.searchsorted(survey.times, cut - 1e-6))
        indices = [0, after - 1, after]
    width = round(min(3.0, max(0.3, survey.info.width / survey.info.height)) * _HEIGHT)
    strip = np.hstack([cv2.resize(survey.frames[k], (width, _HEIGHT), interpolation=cv2.INTER_AREA) for k in indices])
    _, data = cv2.imencode(".jpg", cv2.cvtColor(strip, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return data.tobytes()


def write_report(path: str | os.PathLike[str], table: pa.Table, num_clips: int, skipped: Mapping[str, int]) -> None:
    """Writes the page of a table that `check_clips` returned, for a data set of `num_clips` clips without the skipped ones."""
    columns = {name: table.column(name).cast(pa.float64()).to_numpy() for name in HISTOGRAMS}
    thumbnails: dict[str, list[dict[str, Any]]] = {}
    for row in table.filter(pc.is_valid(table.column("thumbnail"))).to_pylist():
        rows = thumbnails.setdefault(row["rejected_for"] or "accepted", [])
        if len(rows) < _MAX_THUMBNAILS:
            rows.append({**row, "thumbnail": base64.b64encode(row["thumbnail"]).decode()})
    write_page(
        path,
        TEMPLATE,
        checked=table.num_rows,
        num_clips=num_clips,
        skipped={reason: count for reason, count in skipped.items() if count},
        accepted=int(np.sum(table.column("accepted").to_numpy())),
        reasons=count_reasons(table),
        histograms={HISTOGRAMS[name]: histogram(values) for name, values in columns.items()},
        thumbnails=dict(sorted(thumbnails.items(), key=lambda item: (item[0] != "accepted", item[0]))),
        broken=table.filter(pc.equal(table.column("decodable"), False)).slice(0, _MAX_ROWS).to_pylist(),
        copies=table.filter(pc.is_valid(table.column("duplicate_of"))).slice(0, _MAX_ROWS).to_pylist(),
    )
