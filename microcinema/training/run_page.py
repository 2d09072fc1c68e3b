"""A page over training runs, from the files that they write: curves, validation videos, what differs in their configs, and events."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import masked_crc32c

from microcinema.data.quarantine import read_quarantine
from microcinema.evaluation import report
from microcinema.utils.errors import UserError, first_line
from microcinema.utils.files import list_files, natural_key
from microcinema.utils.fingerprint import differences, flatten
from microcinema.utils.templates import render

TEMPLATE = report.TEMPLATE.with_name("runs.html.jinja")
GROUPS = {  # of curves, by the first pattern that fits a metric's name
    "Loss": r"loss(/.*)?|grad_norm|lr",
    "Held-out clips": r"validation/(loss|moving_loss|text_sensitivity)(/.*)?",
    "Validation videos": r"validation/.*",
    "Speed and memory": r"clips_per_second|data_wait|mfu|\w+_(gib|seconds|clips|graphs)",
    "Others": r".*",
}
_DEPTH = 3  # of folders that are searched
_WIDTH, _HEIGHT, _LEFT, _BELOW = 320, 150, 60, 22  # of a plot, pixels
_POINTS = 200  # of a curve
_LARGEST = 2**12  # bytes of an event that is read; longer ones are videos, whose checksums a second does for 9 MB only


class Run:
    """What a run's folder tells; `read` brings it up to date, and reads of the event files only what was added.

    Attributes:
        curves: by metric and step, the value and when it was logged; of a step that was done twice, the last.
        config: every value by its dotted key.
        events: time and text; that a file is missing or damaged is one as well.
        videos: by step, the names of its clips.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, place = folder, folder.relative_to(root).as_posix()
        self.name, self.url = (folder.resolve().name, "") if folder == root else (place, quote(place) + "/")
        self.curves: dict[str, dict[int, tuple[float, float]]] = {}
        self._offsets: dict[Path, int] = {}

    def read(self) -> None:
        """Reads whatever can be read."""
        self.events: list[tuple[float, str]] = []
        self.config: dict[str, Any] = {}
        for path in sorted(self.folder.glob("logs/*/events.*")):
            with self._noted(path.name):
                for event in self._added(path):
                    for value in event.summary.value:
                        if value.HasField("simple_value"):
                            point = value.simple_value, event.wall_time
                            self.curves.setdefault(value.tag, {})[event.step] = point
        with self._noted("config.yaml"):
            self.config = flatten(dict(yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))))
        with self._noted("environment.json"):
            starts = json.loads((self.folder / "environment.json").read_text(encoding="utf-8"))
            for before, start in zip([None, *starts], starts, strict=False):
                self._add_start(before, start)
        for part in ("quarantine", "validation/quarantine"):
            with self._noted(part):
                if records := read_quarantine(self.folder / part):
                    text = f"broken clips in {part}: {len(records)}; the last, {records[-1]['id']}: {records[-1]['reason']}"
                    self.events.append((datetime.fromisoformat(records[-1]["time"]).timestamp(), text))
        for pattern, text in {"not_finite/step*": "stopped: not finite", "model_index.json": "finished: wrote"}.items():
            with self._noted(pattern):  # a run that starts anew removes them
                self.events += [(path.stat().st_mtime, f"{text} {path.name}") for path in self.folder.glob(pattern)]
        folders = sorted((self.folder / "validation").glob("step-*"), key=natural_key)
        self.videos = {
            path.name.removeprefix("step-"): [file.name for file in list_files(path, {".mp4"})] for path in folders
        }

    @property
    def last(self) -> tuple[float, int]:
        """When it logged last, and the step; zeros: never."""
        points = [(when, step) for curve in self.curves.values() for step, (_, when) in curve.items()]
        return max(points, default=(0.0, 0))

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError, UserError) as error:
            self.events.append((time.time(), f"{name} cannot be read: {first_line(error)}"))

    def _added(self, path: Path) -> Iterator[Event]:
        """The events of a file behind those that were read, without what is only half-written."""
        with open(path, "rb") as file:
            file.seek(self._offsets.get(path, 0))
            while len(header := file.read(12)) == 12:
                start, size = self._offsets.get(path, 0), int.from_bytes(header[:8], "little") + 4
                data = file.read(size) if size <= _LARGEST else None
                if not _is_sound(header) or (data and len(data) == size and not _is_sound(data)):
                    raise ValueError(f"damaged at byte {start}, where curves end")
                if data is not None:
                    if len(data) < size:
                        return
                    yield Event.FromString(data[:-4])
                self._offsets[path] = file.seek(start + 12 + size)

    def _add_start(self, before: Mapping[str, Any] | None, start: Mapping[str, Any]) -> None:
        began, text = datetime.fromisoformat(start["time"]).timestamp(), f"started; processes: {start['num_processes']}"
        if before is not None:
            done = [step for curve in self.curves.values() for step, (_, when) in curve.items() if when < began]
            changed = [change for change in differences(start, before) if not change.startswith("time ")]
            text = "; ".join([f"started again, after step {max(done, default=0)} had been logged", *changed])
        self.events.append((began, text))


def _is_sound(record: bytes) -> bool:
    return masked_crc32c(record[:-4]) == int.from_bytes(record[-4:], "little")


def read_runs(root: Path, known: Mapping[Path, Run]) -> dict[Path, Run]:
    """Reads the runs in a folder, which may be one itself; `known` holds those of the last time."""
    files = (path for depth in range(_DEPTH + 1) for path in root.glob("*/" * depth + "environment.json"))
    folders = [path.parent for path in files if not any(part[0] == "." for part in path.relative_to(root).parts)]
    runs = {folder: known.get(folder) or Run(folder, root) for folder in sorted(folders, key=natural_key)}
    for run in runs.values():
        run.read()
    return runs


def render_page(root: Path, runs: Sequence[Run], refresh: int) -> str:
    """The page as HTML; its links are relative to the folder. Served, it reads itself anew every `refresh` seconds."""
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in GROUPS}
    for tag in sorted(
        {tag for run in runs for tag in run.curves}, key=lambda tag: (not tag.endswith("loss"), natural_key(tag))
    ):
        name = next(name for name, pattern in GROUPS.items() if re.fullmatch(pattern, tag))
        groups[name].append(_plot(tag, runs))
    configured = [run for run in runs if run.config]
    keys = sorted({key for run in configured for key in run.config} - {"output_dir"})
    rows = [(key, [str(run.config.get(key, "-")) for run in configured]) for key in keys]
    events = sorted(((when, run.name, text) for run in runs for when, text in run.events), reverse=True)
    return render(
        TEMPLATE,
        name=root.resolve().name,
        runs=runs,
        configured=configured,
        groups={name: plots for name, plots in groups.items() if plots},
        differing=[row for row in rows if len(set(row[1])) > 1],
        common=[(key, values[0]) for key, values in rows if len(set(values)) == 1],
        events=events,
        clock=lambda when: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)),
        refresh=refresh,
    )


def _plot(tag: str, runs: Sequence[Run]) -> dict[str, Any]:
    """The curves of a metric: number of the run, last value and points of each, cut off above and below a hundredth of the values."""
    curves = {
        k: np.array([(step, value) for step, (value, _) in sorted(run.curves[tag].items())])
        for k, run in enumerate(runs)
        if tag in run.curves
    }
    curves = {k: curve[np.isfinite(curve).all(axis=1)] for k, curve in curves.items()}
    means = {
        k: np.array([part.mean(axis=0) for part in np.array_split(curve, min(len(curve), _POINTS))])
        for k, curve in curves.items()
        if len(curve)
    }
    every = np.concatenate([*means.values(), np.zeros((int(not means), 2))])
    low, high = np.percentile(every[:, 1], [1, 99])
    last = max(every[:, 0].max(), 1)

    def line(points: np.ndarray) -> str:
        x = _LEFT + points[:, 0] / last * (_WIDTH - _LEFT - 8)
        y = _HEIGHT - _BELOW - (points[:, 1].clip(low, high) - low) / ((high - low) or 1) * (_HEIGHT - _BELOW - 8)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    lines = [(k, f"{curves[k][-1, 1]:.4g}", line(points)) for k, points in means.items()]
    frame = {"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "bottom": _HEIGHT - _BELOW}
    return {"tag": tag, "lines": lines, "low": f"{low:.3g}", "high": f"{high:.3g}", "last": f"{last:.0f}", **frame}
