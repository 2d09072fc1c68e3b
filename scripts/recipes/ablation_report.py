"""The result of the ablation: a summary of all runs as JSON, as a Markdown table and as a figure."""

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
from scripts.recipes.ablation_grid import FULL, Grid

RESULT_FILE = "result.json"
FIGURE = "ablation.png"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Quantity:
    """A column of the table: its heading, its unit, and how many units make one."""

    label: str
    unit: str
    scale: float = 1.0


QUANTITIES = {
    "object": Quantity("Object", "%", 100),
    "motion": Quantity("Motion", "%", 100),
    "psnr": Quantity("PSNR to key frame", "dB"),
    "loss": Quantity("Final training loss", ""),
}
NOTE = (
    "Mean over seeds with the half-width of its 95 % interval (Student's t over seeds), and in brackets the mean difference to `full` of the same "
    "seed with that of its own. Object and motion are shares of all measured clips. The loss is the denoiser's, over the last tenth of the "
    "steps, without PredictNet's; it can be compared only where neither its weights nor what is predicted from what noise changed."
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
        rows = {}
        for variant, results in found.items():
            measures = {}
            for key in QUANTITIES:
                pairs = [results[seed][key] - found[FULL][seed][key] for seed in results if seed in found[FULL]]
                difference = None if variant == FULL else interval(pairs)
                values = {seed: result[key] for seed, result in results.items()}
                measures[key] = {**interval(list(values.values())), "values": values, "difference": difference}
            rows[variant] = {
                "overrides": content.variants[variant],
                "seeds": list(results),
                "missing": [seed for seed in grid.seeds if seed not in results],
                "measures": measures,
            }
        papers[paper] = rows
    settings = json.loads((output_dir / FINGERPRINT).read_text(encoding="utf-8"))
    return {"settings": settings, "confidence": CONFIDENCE, "versions": versions, "papers": papers}


def markdown(summary: Mapping[str, Any]) -> str:
    """The page of a summary: its table, beside which the figure is expected."""
    headings = [f"{q.label}{f', {q.unit}' if q.unit else ''}" for q in QUANTITIES.values()]
    settings = summary["settings"]
    lines = [
        "# Ablation grid",
        "",
        f"![Differences of every variant to the whole model of the same seed]({FIGURE})",
        "",
    ]
    lines += [f"{settings['max_train_steps']} steps a run; measured with `{' '.join(settings['evaluate'])}`. {NOTE}"]
    for paper, rows in summary["papers"].items():
        lines += ["", f"| {paper} | changes | seeds | {' | '.join(headings)} |"]
        lines.append("| --- | --- | ---: |" + " ---: |" * len(headings))
        for variant, row in rows.items():
            cells = [_cell(row["measures"][key], quantity) for key, quantity in QUANTITIES.items()]
            changes = ", ".join(f"`{override}`" for override in row["overrides"]) or "nothing"
            lines.append(f"| {_label(variant)} | {changes} | {len(row['seeds'])} | {' | '.join(cells)} |")
    missing = [
        f"{paper}/{variant} (seeds {', '.join(map(str, row['missing']))})"
        for paper, rows in summary["papers"].items()
        for variant, row in rows.items()
        if row["missing"]
    ]
    lines += ["", f"Missing: {'; '.join(missing) or 'none'}."]
    return "\n".join(lines) + "\n"


def _cell(measure: Mapping[str, Any], quantity: Quantity) -> str:
    if measure["mean"] is None:
        return "missing"
    digits = 1 if quantity.unit else 4

    def number(of: Mapping[str, Any], sign: str) -> str:
        text = f"{quantity.scale * of['mean']:{sign}.{digits}f}"
        return text if of["high"] is None else f"{text} ± {quantity.scale * (of['high'] - of['mean']):.{digits}f}"

    difference = measure["difference"]
    compared = difference is not None and difference["mean"] is not None
    return number(measure, "") + (f" ({number(difference, '+')})" if compared else "")


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
    papers = summary["papers"]
    heights = [len(rows) for rows in papers.values()]
    figure = Figure(figsize=(14, 1.5 + 0.42 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(papers), len(QUANTITIES), sharey="row", squeeze=False, height_ratios=heights)
    for line, (paper, rows) in zip(panels, papers.items(), strict=True):
        full, others = rows[FULL]["measures"], [variant for variant in rows if variant != FULL]
        for panel, (key, quantity) in zip(line, QUANTITIES.items(), strict=True):
            for place, variant in enumerate(others):
                measure = rows[variant]["measures"][key]
                difference = measure["difference"]
                if difference["mean"] is None:
                    # Across the panel, which has no scale for what is not there.
                    panel.text(0.5, place, "missing", transform=panel.get_yaxis_transform(), ha="center", va="center")
                    continue
                mean = quantity.scale * difference["mean"]
                half = 0.0 if difference["high"] is None else quantity.scale * difference["high"] - mean
                panel.errorbar(mean, place, xerr=half or None, fmt="o", color="tab:blue", capsize=3)
                of_full, values = full[key]["values"], measure["values"]
                pairs = [quantity.scale * (values[seed] - of_full[seed]) for seed in values if seed in of_full]
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
    """Writes the table, as JSON and as Markdown, and the figure."""
    summary = summarise(grid, output_dir)
    write_json(output_dir / "ablation.json", summary)
    with atomic_path(output_dir / "ablation.md") as temporary:
        temporary.write_text(markdown(summary), encoding="utf-8")
    draw(summary, output_dir / FIGURE)
    print(output_dir / "ablation.md")
