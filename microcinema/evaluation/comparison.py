"""Two or more evaluations by one protocol side by side: numbers, paired differences with intervals, and the same clips of each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microcinema.evaluation import statistics
from microcinema.evaluation.measures import Measure, tables
from microcinema.evaluation.report import RESULTS_FILE, embedded_picture, embedded_video, model_name
from microcinema.pipelines.sample_folder import SampleFolder
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import atomic_path, make_folder, write_json
from microcinema.utils.templates import write_page

SAMPLES_FOLDER = "samples"
TEMPLATE = Path(__file__).with_name("templates") / "comparison.html.jinja"
NUM_PICTURES = 12  # prompts whose clips are shown
NUM_DIFFERENT = 2  # and by each measure, those in which the runs differ most


@dataclass(frozen=True)
class Run:
    """An evaluation: its folder, the name in the tables, and the content of its `results.json`."""

    folder: Path
    name: str
    results: Mapping[str, Any]

    @property
    def parts(self) -> list[str]:
        """Of the protocol, in its order."""
        return list(dict.fromkeys(clip["part"] for clip in self.results["clips"]))

    def clips(self, part: str, key: str) -> dict[str, float]:
        """The values of one measure by the clip's name, where it has one."""
        clips = (clip for clip in self.results["clips"] if clip["part"] == part)
        values = {clip["name"]: {**clip["measures"], **clip.get("right", {})}.get(key) for clip in clips}
        return {name: float(value) for name, value in values.items() if value is not None and np.isfinite(value)}

    def of_set(self, part: str, key: str) -> dict[str, Any] | None:
        """The value of a measure of all clips together, with its interval, if it has one."""
        return self.results.get("sets", {"all": self.results.get("values", {})}).get(part, {}).get(key)


def compare(folders: Sequence[str], output_dir: str) -> Path:
    """Writes `comparison.json`, tables in Markdown and LaTeX, and a page; returns the page. Differences are to the first run.

    A difference of means is over the clips that both runs have a value of, with a bootstrap interval; one of FVD has an interval if both have as
    many clips, since the same are then in each resample. A UserError for fewer than two folders, one without results, or results of different
    protocols.
    """
    if len(folders) < 2:
        raise UserError("compare needs two or more folders of evaluations; give compare=[one,other]")
    runs = _open(folders)
    rows = _rows(runs)
    folder = make_folder(output_dir)
    header = ["", *(run.name for run in runs)]
    texts = [[f"{row['title']}{', ' + row['part'] if row['part'] != 'all' else ''}", *_plain(row)] for row in rows]
    copies = tables(header, texts)
    for suffix, text in copies.items():
        with atomic_path(folder / f"comparison.{suffix}") as path:
            path.write_text(text, encoding="utf-8")
    identifier = runs[0].results["protocol"]["identifier"]
    write_json(folder / "comparison.json", {"protocol": identifier, "runs": list(map(str, folders)), "rows": rows})
    values = {"identifier": identifier, "runs": runs, "rows": rows, "tables": copies, "clips": _pictures(runs, rows)}
    write_page(folder / "comparison.html", TEMPLATE, **values)
    print(copies["md"])
    return folder / "comparison.html"


def load_run(folder: Path) -> Run:
    """A finished evaluation; a UserError if there is none."""
    with user_errors(f"'{folder}' has no readable {RESULTS_FILE} ({{reason}}); evaluate it first"):
        results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    if "measures" not in results:
        raise UserError(f"'{folder / RESULTS_FILE}' is of an older version; evaluate again, which is quick")
    return Run(folder, model_name(results), results)


def _open(folders: Sequence[str]) -> list[Run]:
    runs = [load_run(Path(folder)) for folder in folders]
    if len({run.name for run in runs}) < len(runs):  # the same model with other settings
        runs = [Run(run.folder, run.folder.resolve().name, run.results) for run in runs]
    first, *others = (run.results["protocol"]["identifier"] for run in runs)
    for run, identifier in zip(runs[1:], others, strict=True):
        if identifier != first:
            fault = f"compare: '{run.folder}' is of the protocol {identifier}, and '{runs[0].folder}' of {first}"
            raise UserError(f"{fault}; their numbers cannot be compared; evaluate both by one protocol")
    return runs


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each part and measure: the cell of each run, with value and interval, and from the second on the difference to the first."""
    measures = [Measure(**entry) for entry in runs[0].results["measures"]]
    rows = []
    for part in runs[0].parts:
        for measure in measures:
            values = [run.clips(part, measure.key) for run in runs]
            cells: list[dict[str, Any]] = [
                (_average(list(v.values())) if v else {}) | (run.of_set(part, measure.key) or {})
                for run, v in zip(runs, values, strict=True)
            ]
            if not all(cells):
                continue
            kept: list[dict[str, Any]] = [
                {key: cell[key] for key in ("value", "low", "high", "n") if key in cell} for cell in cells
            ]
            for k in range(1, len(runs)):
                pair = (values[0], values[k]) if values[0] else (cells[0], cells[k])
                kept[k] |= {"difference": _difference(bool(values[0]), *pair)}
            row = {"part": part, "key": measure.key, "title": measure.title, "meaning": measure.meaning}
            rows.append(row | {"cells": [_texts(measure, cell) for cell in kept]})
    return rows


def _average(values: list[float]) -> dict[str, Any]:
    return dict(statistics.proportion(values) if set(values) <= {0.0, 1.0} else statistics.mean(values))


def _difference(paired: bool, one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Other minus one: of the same clips, or of two sets by their resamples."""
    if paired:
        return dict(statistics.mean([other[name] - one[name] for name in one.keys() & other.keys()] or [float("nan")]))
    difference = other["value"] - one["value"]
    resamples = [np.array(side.get("resamples", ())) for side in (one, other)]
    same = [side.get(key) for side in (one, other) for key in ("num_generated", "num_real")]
    if not len(resamples[0]) or same[:2] != same[2:]:
        return {"value": difference}
    spread = resamples[1] - resamples[0]
    low, middle, high = np.quantile(
        spread, [(1 - statistics.CONFIDENCE) / 2, 0.5, (1 + statistics.CONFIDENCE) / 2]
    ).tolist()
    return {"value": difference, "low": difference + low - middle, "high": difference + high - middle}


def _texts(measure: Measure, cell: dict[str, Any]) -> dict[str, Any]:
    """The cell with its texts; `verdict` is `better` or `worse` where the interval of the difference does not contain 0."""
    texts = {"text": measure.number(cell["value"]), "interval": "", "change": "", "change_interval": "", "verdict": ""}
    if "low" in cell:
        texts["interval"] = f"{measure.number(cell['low'])} to {measure.number(cell['high'])}"
    if "difference" in cell:
        found = cell["difference"]
        texts["change"] = measure.number(found["value"], signed=True)
        if "low" in found:
            low, high = found["low"], found["high"]
            texts["change_interval"] = f"{measure.number(low, True)} to {measure.number(high, True)}"
            if measure.better and (low > 0 or high < 0):
                texts["verdict"] = "better" if (low > 0) == (measure.better == "higher") else "worse"
    return cell | texts


def _plain(row: Mapping[str, Any]) -> list[str]:
    """The texts of a row for a table: the difference stands behind the value."""
    return [cell["text"] + (f" ({cell['change']})" if cell["change"] else "") for cell in row["cells"]]


def _pictures(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Clips of the same prompts: evenly spaced ones, and those in which two runs differ most by a measure."""
    folders = [run.folder / SAMPLES_FOLDER for run in runs]
    if not all(folder.is_dir() for folder in folders):
        return []  # of another model, whose videos are elsewhere
    clips = {clip["name"]: clip for clip in runs[0].results["clips"]}
    shared = [name for name in clips if all((folder / f"{name}.npz").is_file() for folder in folders)]
    notes: dict[str, str] = {}
    for row in rows:
        one, other = (run.clips(row["part"], row["key"]) for run in (runs[0], runs[-1]))
        both = sorted((name for name in shared if name in one and name in other), key=lambda n: -abs(other[n] - one[n]))
        for name in both[:NUM_DIFFERENT]:
            if other[name] != one[name]:
                notes.setdefault(name, f"differ most by {row['title']}")
    even = np.unique(np.linspace(0, len(shared) - 1, NUM_PICTURES).round().astype(int)).tolist() if shared else []
    chosen = {**notes, **{shared[i]: "" for i in even if shared[i] not in notes}}
    samples, shown = [SampleFolder(folder, ("frames",)) for folder in folders], []
    for name, note in chosen.items():
        found = [folder.load(name) for folder in samples]
        fps = runs[0].results["protocol"].get("fps") or runs[0].results["generated"]["fps"]
        sides = [(embedded_picture(clip.keyframe), embedded_video(clip.frames, fps)) for clip in found]
        shown.append({"prompt": clips[name]["prompt"], "note": note, "sides": sides})
    return shown
