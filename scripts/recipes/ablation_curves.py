"""Curves of the ablation: what a run logged of its held-out clips, over steps and over seconds of training."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from microcinema.config.compose import load
from microcinema.utils.errors import UserError

Curves = Mapping[str, Sequence[float]]
"""`step`, `seconds` of training until then at the median pace of the run, and every figure of `validation/`."""


def read_curves(trained: Path) -> tuple[dict[str, list[float]], float]:
    """The curves of a training run, one entry for each measurement of its held-out clips, and the seconds of all steps by the clock.

    Neither counts validations and checkpoints. The median pace hardly depends on what else the machine does meanwhile.

    Raises:
        UserError: an interval that was not logged, as when a process is killed while it writes, or no measurement after the last.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load(trained / "config.yaml", "train")
    log = EventAccumulator(str(trained / "logs" / "microcinema"), size_guidance={"scalars": 0})
    log.Reload()
    # By step: of one that was done twice, since its checkpoint came before it, the last counts.
    scalars = {tag: {event.step: event.value for event in log.Scalars(tag)} for tag in log.Tags()["scalars"]}
    rates, steps = scalars.get("clips_per_second", {}), config.max_train_steps
    figures = {
        tag.removeprefix("validation/"): values for tag, values in scalars.items() if tag.startswith("validation/")
    }
    every = config.logging_steps, config.checkpointing_steps, config.validation_steps
    ends = [step for step in range(1, steps + 1) if step == steps or any(step % each == 0 for each in every)]
    if any(step not in rates for step in ends) or steps not in figures.get("loss", {}):
        raise UserError(f"the log in '{trained}' lacks some of its {steps} steps; delete this folder and start again")
    clips = config.train_batch_size * config.gradient_accumulation_steps
    seconds = {step: clips / rates[step] for step in ends}  # of one step
    pace, whole = float(np.median([*seconds.values()])), sum((b - a) * seconds[b] for a, b in pairwise([0, *ends]))
    measured = sorted(figures["loss"])
    curves = {"step": measured, "seconds": [step * pace for step in measured]}
    return curves | {name: [values[step] for step in measured] for name, values in figures.items()}, whole


def at_equal_time(one: Curves, other: Curves, figure: str = "loss") -> tuple[float, float] | None:
    """A figure of two runs when both have trained as long as the shorter one in all, linearly between measurements; None before the first."""
    end = min(one["seconds"][-1], other["seconds"][-1])
    if end < max(one["seconds"][0], other["seconds"][0]):
        return None
    first, second = (float(np.interp(end, curves["seconds"], curves[figure])) for curves in (one, other))
    return first, second


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


def draw_curves(papers: Mapping[str, Mapping[str, Any]], reference: str, path: Path) -> None:
    """The figure: for each paper the differences of the held-out loss to `reference`, over steps and over seconds; the band spans the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5 * len(papers)), layout="constrained")
    rows = figure.subplots(len(papers), 2, squeeze=False, sharey="row")
    for row, (paper, variants) in zip(rows, papers.items(), strict=True):
        for panel, (axis, label) in zip(row, (("step", "steps"), ("seconds", "seconds of training")), strict=True):
            for variant, content in variants.items():
                if variant != reference:
                    places, values = differences(content["curves"], variants[reference]["curves"], axis)
                    if len(places):
                        (line,) = panel.plot(places, values.mean(0), ".-", label=variant.replace("_", " "))
                        panel.fill_between(places, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
            panel.axhline(0, color="black", linewidth=0.8, linestyle=":")
            panel.set_xlabel(label)
        row[0].set_ylabel(f"{paper}: held-out loss less that of {reference}")
        if row[1].lines[1:]:
            row[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
