"""The result of the ablation: a summary of all runs as JSON, as Markdown tables and as figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path, write_json
from microcinema.utils.fingerprint import FINGERPRINT
from scripts.recipes.ablation_curves import at_equal_time, draw_curves
from scripts.recipes.ablation_grid import FULL, Grid

RESULT_FILE = "result.json"
FIGURE, CURVES = "ablation.png", "ablation_curves.png"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Quantity:
    """A column of the table: its heading, its unit, and how many units make one."""

    label: str
    unit: str
    scale: float = 1.0


QUANTITIES = {
    "loss": Quantity("Held-out loss", ""),
    "loss_at_equal_time": Quantity("Held-out loss at equal time", ""),
    "text_sensitivity": Quantity("Text sensitivity", "%", 100),
    "moving_loss": Quantity("Held-out loss in moving places", ""),
    "seconds": Quantity("Training", "s"),
    "object": Quantity("Object", "%", 100),
    "motion": Quantity("Motion", "%", 100),
    "psnr": Quantity("PSNR to key frame", "dB"),
}
JUDGED = ("object", "motion", "psnr")
"""Columns that are left out where no run has been judged."""
NOTE = (
    "Mean over seeds with the half-width of its 95 % interval (Student's t over seeds), and in brackets the mean difference to `full` of the same "
    "seed with that of its own. The held-out loss is that of the target with the averaged weights, at fixed clips, noise and diffusion times; it compares only where "
    "neither the target nor the noise changed. At equal time both runs have trained as long as the shorter one takes for all its steps, at the median pace of each. "
    "Text sensitivity is the relative increase of the loss in moving places by a caption with the opposite motion."
)


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and its 95 % interval by Student's t: `mean`, `low`, `high`, `n`; None where there are too few values to say."""
    n = len(values)
    mean = float(np.mean(values)) if n else None
    low = high = None
    if mean is not None and n > 1:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "n": n}


def summarise(grid: Grid, output_dir: Path) -> dict[str, Any]:
    """Everything that is published: for each variant of each paper its seeds, its measures, and their differences to `full`; every
    variant and seed of the grid is in it, those that have not been run as missing.

    Raises:
        UserError: nothing has been run here.
    """
    if not (output_dir / FINGERPRINT).is_file():
        raise UserError(f"'{output_dir}' holds no ablation; run one into it first")
    versions: list[Any] = []
    papers: dict[str, Any] = {}
    for paper, content in grid.papers.items():
        found: dict[str, dict[int, Any]] = {}
        for variant in content.variants:
            files = (output_dir / paper / variant).glob(f"seed-*/{RESULT_FILE}")
            results = {int(file.parent.name.removeprefix("seed-")): json.loads(file.read_text()) for file in files}
            found[variant] = dict(sorted(results.items()))
            for result in results.values():
                if result["versions"] not in versions:
                    versions.append(result["versions"])
        keys = [key for results in found.values() for result in results.values() for key in result]
        levels = dict.fromkeys(key for key in keys if key.startswith("loss/"))
        papers[paper] = {
            variant: {
                "overrides": content.variants[variant],
                "seeds": list(results),
                "missing": [seed for seed in grid.seeds if seed not in results],
                "measures": {key: _measure(key, results, found[FULL]) for key in (*QUANTITIES, *levels)},
                "curves": {seed: result["curves"] for seed, result in results.items()},
            }
            for variant, results in found.items()
        }
    settings = json.loads((output_dir / FINGERPRINT).read_text(encoding="utf-8"))
    return {"settings": settings, "confidence": CONFIDENCE, "versions": versions, "papers": papers}


def _measure(key: str, results: Mapping[int, Any], full: Mapping[int, Any]) -> dict[str, Any]:
    """A quantity of a variant: its interval and values by seed, and `difference` to `full`: the interval and the differences by seed."""
    values, differences = {}, {}
    for seed, result in results.items():
        own, of_full = _pair(key, result, full.get(seed, result))
        if own is not None:
            values[seed] = own
            if seed in full and of_full is not None:
                differences[seed] = own - of_full
    difference = None if results is full else {**interval(list(differences.values())), "values": differences}
    return {**interval(list(values.values())), "values": values, "difference": difference}


def _pair(key: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """A quantity of two results; None where it was not measured."""
    if key == "loss_at_equal_time":
        return at_equal_time(one["curves"], other["curves"]) or (None, None)
    return one.get(key), other.get(key)


def _shown(summary: Mapping[str, Any]) -> dict[str, Quantity]:
    rows = [row for paper in summary["papers"].values() for row in paper.values()]
    judged = any(row["measures"][key]["values"] for row in rows for key in JUDGED)
    return {key: quantity for key, quantity in QUANTITIES.items() if judged or key not in JUDGED}


def markdown(summary: Mapping[str, Any]) -> str:
    """The page of a summary: its tables, beside which the figures are expected."""
    shown, settings = _shown(summary), summary["settings"]
    headings = [f"{q.label}{f', {q.unit}' if q.unit else ''}" for q in shown.values()]
    lines = [
        "# Ablation grid",
        "",
        f"![Differences of every variant to the whole model of the same seed]({FIGURE})",
        "",
        f"![Differences of the held-out loss over steps and over time]({CURVES})",
        "",
    ]
    lines += [f"{settings['max_train_steps']} steps a run. {NOTE}"]
    if any(key in shown for key in JUDGED):
        command = " ".join(settings["evaluate"])
        lines[-1] += f" Object and motion are shares of all clips that are sampled and judged with `{command}`."
    for paper, rows in summary["papers"].items():
        lines += ["", f"| {paper} | changes | seeds | {' | '.join(headings)} |"]
        lines.append("| --- | --- | ---: |" + " ---: |" * len(headings))
        for variant, row in rows.items():
            cells = [_cell(row["measures"][key], quantity) for key, quantity in shown.items()]
            changes = ", ".join(f"`{override}`" for override in row["overrides"]) or "nothing"
            lines.append(f"| {_label(variant)} | {changes} | {len(row['seeds'])} | {' | '.join(cells)} |")
        lines += _by_level(rows)
    missing = [
        f"{paper}/{variant} (seeds {', '.join(map(str, row['missing']))})"
        for paper, rows in summary["papers"].items()
        for variant, row in rows.items()
        if row["missing"]
    ]
    lines += ["", f"Missing: {'; '.join(missing) or 'none'}."]
    return "\n".join(lines) + "\n"


def _by_level(rows: Mapping[str, Any]) -> list[str]:
    """A table of the held-out loss less that of `full`: of each seed, and at each diffusion time over the seeds."""
    levels = [key for key in rows[FULL]["measures"] if key.startswith("loss/")]
    seeds = sorted({seed for row in rows.values() for seed in row["seeds"]})
    if not levels:
        return []
    heads = ["held-out loss less that of full", *(f"seed {seed}" for seed in seeds), *(key[5:] for key in levels)]
    lines = ["", f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for variant, row in rows.items():
        if variant != FULL:
            of_seeds = row["measures"]["loss"]["difference"]["values"]
            cells = [f"{of_seeds[seed]:+.4f}" if seed in of_seeds else "missing" for seed in seeds]
            cells += [_number(row["measures"][key]["difference"], Quantity("", ""), "+") for key in levels]
            lines.append(f"| {_label(variant)} | {' | '.join(cells)} |")
    return lines


def _cell(measure: Mapping[str, Any], quantity: Quantity) -> str:
    difference = measure["difference"]
    compared = difference is not None and difference["mean"] is not None
    return _number(measure, quantity) + (f" ({_number(difference, quantity, '+')})" if compared else "")


def _number(of: Mapping[str, Any], quantity: Quantity, sign: str = "") -> str:
    """A mean with the half-width of its interval."""
    if of["mean"] is None:
        return "missing"
    digits = 1 if quantity.unit else 4
    text = f"{quantity.scale * of['mean']:{sign}.{digits}f}"
    return text if of["high"] is None else f"{text} ± {quantity.scale * (of['high'] - of['mean']):.{digits}f}"


def _label(variant: str) -> str:
    return variant.replace("_", " ")


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """The figure: a row of panels for each paper, a panel for each quantity; differences to `full` of the same seed, which vary much less than
    the seeds do, with their intervals, seeds as dots.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the figure needs matplotlib; pip install 'microcinema[dev]'") from None
    papers, shown = summary["papers"], _shown(summary)
    heights = [len(rows) for rows in papers.values()]
    figure = Figure(figsize=(3.2 * len(shown), 1.5 + 0.42 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(papers), len(shown), sharey="row", squeeze=False, height_ratios=heights)
    for line, (paper, rows) in zip(panels, papers.items(), strict=True):
        full, others = rows[FULL]["measures"], [variant for variant in rows if variant != FULL]
        for panel, (key, quantity) in zip(line, shown.items(), strict=True):
            for place, variant in enumerate(others):
                difference = rows[variant]["measures"][key]["difference"]
                if difference["mean"] is None:
                    # Across the panel, which has no scale for what is not there.
                    panel.text(0.5, place, "missing", transform=panel.get_yaxis_transform(), ha="center", va="center")
                    continue
                mean = quantity.scale * difference["mean"]
                half = 0.0 if difference["high"] is None else quantity.scale * difference["high"] - mean
                panel.errorbar(mean, place, xerr=half or None, fmt="o", color="tab:blue", capsize=3)
                pairs = [quantity.scale * value for value in difference["values"].values()]
                panel.plot(pairs, [place] * len(pairs), ".", color="grey", markersize=4)
            panel.axvline(0, color="black", linewidth=0.8, linestyle=":")
            panel.set_xlabel(f"{quantity.label}{f', {quantity.unit}' if quantity.unit else ''}")
            whole = "missing" if full[key]["mean"] is None else f"{quantity.scale * full[key]['mean']:.3g}"
            panel.set_title(f"difference to full: {whole}", fontsize="medium")
        line[0].set_yticks(range(len(others)), [_label(variant) for variant in others])
        line[0].set_ylim(len(others) - 0.5, -0.5)
        line[0].set_ylabel(paper)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def publish(grid: Grid, output_dir: Path) -> None:
    """Writes the tables, as JSON and as Markdown, and the figures."""
    summary = summarise(grid, output_dir)
    write_json(output_dir / "ablation.json", summary)
    with atomic_path(output_dir / "ablation.md") as temporary:
        temporary.write_text(markdown(summary), encoding="utf-8")
    draw(summary, output_dir / FIGURE)
    with atomic_path(output_dir / CURVES) as temporary:
        draw_curves(summary["papers"], FULL, temporary)
    print(output_dir / "ablation.md")
