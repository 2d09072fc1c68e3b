"""The table of a sweep: each measure of each variant over seeds, with intervals and paired differences to the first variant."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from microcinema.evaluation.comparison import load_run
from microcinema.evaluation.measures import Measure, tables
from microcinema.evaluation.statistics import CONFIDENCE, over_runs
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path, write_json

HELD_OUT = (
    Measure("loss", "Held-out loss", "of the target with the averaged weights, at the last step", "", "lower", 4),
    Measure("moving_loss", "In moving places", "the same where the clip departs from its key frame", "", "lower", 4),
    Measure("text_sensitivity", "Text sensitivity", "relative increase by the text of another clip", "%", "higher", 1),
)
Figures = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Values by variant, seed and key of the measure."""


def evaluation_figures(folder: Path) -> tuple[dict[str, float], list[Measure]]:
    """The measures of a finished evaluation: of all its clips, and what only a part of them has as `part/measure`.

    Raises:
        UserError: there is no `results.json`.
    """
    run, figures, measures = load_run(folder), {}, []
    for measure in (Measure(**entry) for entry in run.results["measures"]):
        if values := [value for part in run.parts for value in run.clips(part, measure.key).values()]:
            figures[measure.key] = sum(values) / len(values)
            measures.append(measure)
        for part in run.parts:
            if cell := run.of_set(part, measure.key):
                key, label = (
                    (measure.key, measure.label)
                    if part == "all"
                    else (f"{part}/{measure.key}", f"{measure.label}, {part}")
                )
                figures[key] = float(cell["value"])
                measures.append(replace(measure, key=key, label=label))
    return figures, measures


def summarize(figures: Figures, measures: Sequence[str]) -> dict[str, Any]:
    """For each variant and measure the mean over seeds with its interval, the values, and `difference`: the same of the differences to the first
    variant of the same seed; None for the first."""
    first, *_ = figures
    summary: dict[str, Any] = {}
    for variant, runs in figures.items():
        summary[variant] = {}
        for key in measures:
            values = {seed: run[key] for seed, run in runs.items() if key in run}
            pairs = {
                seed: v - figures[first][seed][key] for seed, v in values.items() if key in figures[first].get(seed, {})
            }
            difference = None if variant == first else {**over_runs([*pairs.values()]), "values": pairs}
            summary[variant][key] = {**over_runs([*values.values()]), "values": values, "difference": difference}
    return summary


def write_tables(folder: Path, figures: Figures, measures: Mapping[str, Measure], columns: Sequence[str] | None) -> str:
    """Writes `sweep.json`, `sweep.md`, `sweep.tex` and `sweep.csv`, which has a row for each variant and measure; returns the Markdown.

    Args:
        columns: keys of the measures in the table; None: all that have a meaning.

    Raises:
        UserError: a column that no run has.
    """
    if unknown := [key for key in columns or () if key not in measures]:
        raise UserError(f"measures: no run has '{unknown[0]}'; they have {', '.join(measures)}")
    shown = [key for key in measures if measures[key].meaning] if columns is None else list(columns)
    summary = summarize(figures, list(measures))
    write_json(folder / "sweep.json", {"confidence": CONFIDENCE, "variants": summary})
    with atomic_path(folder / "sweep.csv") as path, path.open("w", encoding="utf-8", newline="") as file:
        names = ["value", "low", "high", "n"]
        writer = csv.writer(file)
        writer.writerow(["variant", "measure", *names, *(f"difference_{name}" for name in names)])
        for variant, cells in summary.items():
            for key, cell in cells.items():
                both = cell, cell["difference"] or {}
                writer.writerow([variant, key, *(side.get(name) for side in both for name in names)])
    header = ["", "seeds", *(measures[key].title for key in shown)]
    rows = [
        [variant, str(len(figures[variant])), *(_text(measures[key], cells[key]) for key in shown)]
        for variant, cells in summary.items()
    ]
    copies = tables(header, rows)
    for suffix, text in copies.items():
        with atomic_path(folder / f"sweep.{suffix}") as path:
            path.write_text(text, encoding="utf-8")
    return copies["md"]


def _text(measure: Measure, cell: Mapping[str, Any]) -> str:
    """`0.788 ± 0.115 (+0.105 ± 0.021)`: mean and half-width of its interval, and those of the difference."""
    if cell["value"] is None:
        return "missing"
    text = measure.number(cell["value"], signed="difference" not in cell)
    if cell["high"] is not None:
        text += f" ± {measure.number(cell['high'] - cell['value'])}"
    difference = cell.get("difference")
    return f"{text} ({_text(measure, difference)})" if difference and difference["n"] else text
