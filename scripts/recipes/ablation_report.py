"""The page of the ablation: the tables of its sweeps, and figures of differences and of curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microcinema.commands.sweep import Run
from microcinema.config.schema import Sweep
from microcinema.evaluation.measures import Measure
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path
from scripts.recipes.ablation_curves import draw_curves, read_curves

FIGURE, CURVES = "ablation.png", "ablation_curves.png"
NOTE = (
    "Mean over seeds with the half-width of its 95 % interval (Student's t over seeds), and in brackets the mean difference to `full` of the same "
    "seed with that of its own. The held-out loss is that of the target with the averaged weights, at fixed clips, noise and diffusion times; it compares only where "
    "neither the target nor the noise changed. Opposite motion is the relative increase of the loss in moving places by a caption with the opposite motion."
)


def publish(output_dir: Path, sweeps: Mapping[str, tuple[Sweep, Sequence[Run]]]) -> None:
    """Writes the page and the figures of sweeps, by paper.

    Raises:
        UserError: matplotlib is not installed.
    """
    lines = ["# Ablation grid", "", f"![Differences to the whole model of the same seed]({FIGURE})", ""]
    lines += [f"![Differences of the held-out loss over steps and over time]({CURVES})", "", NOTE]
    summaries, measures, curves = {}, {}, {}
    for paper, (config, runs) in sweeps.items():
        folder = Path(config.output_dir)
        changes = [
            f"`{name}`: {', '.join(f'`{c}`' for c in told) or 'nothing'}"
            for name, told in (config.variants or {}).items()
        ]
        lines += ["", f"## {paper}", "", (folder / "sweep.md").read_text(encoding="utf-8")]
        lines += ["What each changes: " + "; ".join(changes) + "."]
        summaries[paper] = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["variants"]
        curves[paper] = {name: {} for name in summaries[paper]}
        for run in runs:
            for record in run.records():
                measures |= {entry["key"]: Measure(**entry) for entry in record["measures"]}
            if (run.folder / "train.json").is_file():
                curves[paper][run.variant][run.seed] = read_curves(run.folder / "train")
    with atomic_path(output_dir / "ablation.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(summaries, measures, output_dir / FIGURE)
    with atomic_path(output_dir / CURVES) as temporary:
        draw_curves(curves, "full", temporary)
    print(output_dir / "ablation.md")


def draw(summaries: Mapping[str, Any], measures: Mapping[str, Measure], path: Path) -> None:
    """The figure: a row of panels for each paper, a panel for each measure; differences to the first variant of the same seed, which vary much
    less than the seeds do, with their intervals, seeds as dots.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the figure needs matplotlib; pip install 'microcinema[dev]'") from None
    heights = [len(rows) for rows in summaries.values()]
    figure = Figure(figsize=(3.2 * len(measures), 1.5 + 0.42 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(summaries), len(measures), sharey="row", squeeze=False, height_ratios=heights)
    for line, (paper, rows) in zip(panels, summaries.items(), strict=True):
        first, *others = rows
        for panel, (key, measure) in zip(line, measures.items(), strict=True):
            scale = 100 if measure.unit == "%" else 1
            for place, variant in enumerate(others):
                difference = rows[variant].get(key, {}).get("difference")
                if difference is None or difference["value"] is None:
                    # Across the panel, which has no scale for what is not there.
                    panel.text(0.5, place, "missing", transform=panel.get_yaxis_transform(), ha="center", va="center")
                    continue
                value, high = difference["value"], difference["high"]
                half = None if high is None else scale * (high - value)
                panel.errorbar(scale * value, place, xerr=half, fmt="o", color="tab:blue", capsize=3)
                pairs = [scale * pair for pair in difference["values"].values()]
                panel.plot(pairs, [place] * len(pairs), ".", color="grey", markersize=4)
            panel.axvline(0, color="black", linewidth=0.8, linestyle=":")
            panel.set_xlabel(measure.title)
            whole = rows[first].get(key, {}).get("value")
            panel.set_title(
                f"difference to {first}: {'missing' if whole is None else measure.format(whole)}", fontsize="medium"
            )
        line[0].set_yticks(range(len(others)), [variant.replace("_", " ") for variant in others])
        line[0].set_ylim(len(others) - 0.5, -0.5)
        line[0].set_ylabel(paper)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
