"""The page of `prepare check`: how many clips are rejected and why, histograms, pictures. Nothing is loaded from elsewhere."""

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from microcinema.utils.files import atomic_path
from microcinema.utils.templates import open_template

TEMPLATE = "quality_report.html.jinja"
_BINS = 40
_SHOWN = 24  # clips shown of each verdict
HISTOGRAMS = {
    "duration": "seconds",
    "num_frames": "frames",
    "fps": "frames per second",
    "width": "width, pixels",
    "height": "height, pixels",
    "motion": "motion: mean change between looks, levels of 255",
    "watermark": "watermark: correlation with what the clips have in common",
}


def counts(table: pa.Table) -> dict[str, int]:
    """Clips for each reason to reject them; one clip may have several."""
    found: dict[str, int] = {}
    for entry in pc.value_counts(table.column("rejected_for").drop_null()).to_pylist():
        for reason in entry["values"].split(", "):
            found[reason] = found.get(reason, 0) + entry["counts"]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def histogram(values: np.ndarray) -> dict[str, Any] | None:
    """Counts in 40 bins between the first and the last percentile, what lies beyond in the outermost; None: no value."""
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


def write_report(path: str | os.PathLike[str], table: pa.Table, available: int, skipped: Mapping[str, int]) -> None:
    """Writes the page, whole or not at all.

    Args:
        table: the manifest, with the columns `caption` and `picture` (JPEG; null for most).
        available: clips in the data set.
        skipped: clips that the data set has left out by itself, by reason.
    """
    columns = {name: table.column(name).cast(pa.float64()).to_numpy() for name in HISTOGRAMS}
    pictured = table.filter(pc.is_valid(table.column("picture"))).to_pylist()
    shown: dict[str, list[dict[str, Any]]] = {}
    for row in pictured:
        verdict = row["rejected_for"] or "accepted"
        if len(shown.setdefault(verdict, [])) < _SHOWN:
            shown[verdict].append({**row, "picture": base64.b64encode(row["picture"]).decode()})
    broken = table.filter(pc.equal(table.column("decodable"), False)).slice(0, 200).to_pylist()
    copies = table.filter(pc.is_valid(table.column("duplicate_of"))).slice(0, 200).to_pylist()
    page = open_template(Path(__file__).with_name("templates") / TEMPLATE).render(
        checked=table.num_rows,
        available=available,
        skipped={reason: count for reason, count in skipped.items() if count},
        accepted=int(np.sum(table.column("accepted").to_numpy())),
        counts=counts(table),
        histograms={HISTOGRAMS[name]: histogram(values) for name, values in columns.items()},
        shown=dict(sorted(shown.items(), key=lambda item: (item[0] != "accepted", item[0]))),
        broken=broken,
        copies=copies,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
