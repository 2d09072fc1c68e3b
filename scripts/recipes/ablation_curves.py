"""Curves of the ablation: what a run logged of its held-out clips, over steps and over seconds of training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from microcinema.config.compose import load
from microcinema.training.heldout_loss import RECORD
from microcinema.utils.errors import UserError

Curves = Mapping[str, Sequence[float]]
"""`step`, `seconds` of training until then at the median pace of the run, and every figure of the held-out clips."""


def read_curves(trained: Path) -> dict[str, list[float]]:
    """The curves of a training run, one entry for each measurement of its held-out clips.

    `seconds` count neither validations nor checkpoints; the median pace hardly depends on what else the machine does meanwhile.

    Raises:
        UserError: a run whose pace was not logged, or without a measurement after its last step.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load(trained / "config.yaml", "train")
    folder, rates = trained / "logs" / config.tracker.project, []
    if folder.is_dir():
        log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        rates = [event.value for event in log.Scalars("clips_per_second")]
    entries = json.loads((trained / RECORD).read_text(encoding="utf-8")) if (trained / RECORD).is_file() else []
    measured = {entry["step"]: entry for entry in entries}  # of a step that was done twice, the last
    if not rates or config.max_train_steps not in measured:
        raise UserError(f"the log in '{trained}' lacks some of its steps; delete this folder and start again")
    pace = float(np.median(rates)) / (config.train_batch_size * config.gradient_accumulation_steps)
    names = measured[config.max_train_steps]
    curves = {name: [measured[step][name] for step in sorted(measured)] for name in names}
    return {**curves, "seconds": [step / pace for step in curves["step"]]}


def differences(ones: Mapping[int, Curves], fulls: Mapping[int, Curves], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Held-out loss less that of `full` of the same seed, where all runs lie between measurements.

    Args:
        ones, fulls: curves by seed.
        axis: step or seconds.

    Returns:
        Values of the axis, (k,), as many as measurements; differences, (seeds, k). Both are empty if there are none.
    """
    pairs = [(ones[seed], fulls[seed]) for seed in ones if seed in fulls]
    if not pairs:
        return np.empty(0), np.empty((0, 0))
    low = max(curves[axis][0] for pair in pairs for curves in pair)
    high = min(curves[axis][-1] for pair in pairs for curves in pair)
    if low > high:
        return np.empty(0), np.empty((0, 0))
    places = np.linspace(low, high, len(pairs[0][0][axis]))
    values = [[np.interp(places, curves[axis], curves["loss"]) for curves in pair] for pair in pairs]
    return places, np.array([one - full for one, full in values])


def draw_curves(papers: Mapping[str, Mapping[str, Mapping[int, Curves]]], reference: str, path: Path) -> None:
    """The figure: for each paper the differences of the held-out loss to `reference`, over steps and over seconds; the band spans the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5 * len(papers)), layout="constrained")
    rows = figure.subplots(len(papers), 2, squeeze=False, sharey="row")
    for row, (paper, variants) in zip(rows, papers.items(), strict=True):
        for panel, (axis, label) in zip(row, (("step", "steps"), ("seconds", "seconds of training")), strict=True):
            for variant, content in variants.items():
                if variant != reference:
                    places, values = differences(content, variants[reference], axis)
                    if len(places):
                        (line,) = panel.plot(places, values.mean(0), ".-", label=variant.replace("_", " "))
                        panel.fill_between(places, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
            panel.axhline(0, color="black", linewidth=0.8, linestyle=":")
            panel.set_xlabel(label)
        row[0].set_ylabel(f"{paper}: held-out loss less that of {reference}")
        if row[1].lines[1:]:
            row[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
