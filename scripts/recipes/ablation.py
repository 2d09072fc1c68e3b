"""The ablation grid: trains and measures every variant of every paper for several seeds, and draws one table and one figure.

    microcinema prepare sprites num_videos=6000 rotation_weight=4
    microcinema prepare latents experiment=sprites_factorized_dreamer "cached_parts=[keyframe, flow]"
    python scripts/recipes/ablation.py --workers 2

The grid is `configs/ablation/sprites.yaml`. A run is `train` and then `evaluate`, each a process of its own, in
`<output-dir>/<paper>/<variant>/seed-<n>`. Started again, the grid goes on: a run whose result stands is skipped, a training that was broken
off resumes from its last checkpoint. Settings of every run of an output directory are the same but for what its variant changes; others are
refused. `ablation.md`, `ablation.json` and `ablation.png` are drawn after the last run, and by `--table` at any time from what stands.

Size, as shipped: 14 variants, 3 seeds, 800 steps of 2 clips, 64 measured clips a run. With two workers on two cores a run of MicroCinema took 4 minutes and
one of Factorized-Dreamer 4.5, the whole grid 1 hour 30: three times the steps fit into a night. On one GPU, which networks this small leave idle
most of the time, half an hour is 5 minutes a run with `--workers 8` (an estimate; it has not been measured).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from scipy import stats
from yaml import YAMLError

from microcinema.config.compose import compose, load, plain
from microcinema.config.help import config_folder
from microcinema.pipelines.loading import INDEX
from microcinema.sprites.evaluate import RESULTS_FILE
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path, make_folder, write_json
from microcinema.utils.fingerprint import FINGERPRINT, write_or_verify

RESULT_FILE = "result.json"
FIGURE = "ablation.png"
CONFIDENCE = 0.95
FULL = "full"
INTERRUPTED = 130


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

Runner = Callable[[str, Sequence[str], Path], int]
"""Runs a command (`train`, `evaluate`) with overrides, writes what it says to a file, and returns its exit status."""


@dataclass
class Paper:
    """What all runs of a paper are told to train with, and what each variant is told beside it."""

    train: list[str]
    variants: dict[str, list[str]]


@dataclass
class Grid:
    """A grid file; see the comments of the one that is shipped."""

    seeds: list[int]
    max_train_steps: int
    train: list[str]
    evaluate: list[str]
    papers: dict[str, Paper]

    def train_overrides(self, paper: str, variant: str) -> list[str]:
        """What a variant's `train` is told, but for seed, steps and folders."""
        return [*self.papers[paper].train, *self.train, *self.papers[paper].variants[variant]]


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    paper: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.paper}/{self.variant}/seed-{self.seed}"


# --- the grid --------------------------------------------------------------------------------------------------------------------


def load_grid(path: Path) -> Grid:
    """A grid file.

    Raises:
        UserError: no grid, or a paper without the variant `full` that the others are compared with.
    """
    try:
        grid: Grid = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Grid), OmegaConf.load(path)))  # type: ignore[assignment]
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"'{path}' is no grid: {' '.join(str(error).split())}") from None
    for name, paper in grid.papers.items():
        if FULL not in paper.variants:
            raise UserError(f"paper '{name}' of '{path}' has no variant '{FULL}' to compare with")
    return grid


def choose(grid: Grid, papers: Sequence[str] | None, variants: Sequence[str] | None, seeds: Sequence[int]) -> list[Run]:
    """The runs of these papers, variants and seeds (None: all), seed by seed, so that a grid that is broken off is narrow, not short.

    Raises:
        UserError: a name that is not in the grid.
    """
    known = {"paper": set(grid.papers), "variant": {v for p in grid.papers.values() for v in p.variants}}
    for kind, chosen in (("paper", papers), ("variant", variants)):
        for name in chosen or ():
            if name not in known[kind]:
                raise UserError(f"the grid has no {kind} '{name}'; it has {', '.join(sorted(known[kind]))}")
    return [
        Run(paper, variant, seed)
        for seed in seeds
        for paper, content in grid.papers.items()
        for variant in content.variants
        if paper in (papers or known["paper"]) and variant in (variants or known["variant"])
    ]


# --- runs ------------------------------------------------------------------------------------------------------------------------


class Processes:
    """A `Runner` that gives every command a process: what fails, fails alone, and its memory is given back."""

    def __init__(self, workers: int) -> None:
        threads = max(1, (os.cpu_count() or 1) // workers)
        # As in the Makefile: the C library otherwise hands each large buffer back to the kernel and faults it in again.
        malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
        # Progress once in a minute: it goes to a file.
        self.environment = {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "60", **malloc, **os.environ}
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def __call__(self, command: str, overrides: Sequence[str], log: Path) -> int:
        if self._stopped:
            return INTERRUPTED
        script = Path(__file__).with_name(f"{command}.py")
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, str(script), *overrides], stdout=file, stderr=subprocess.STDOUT, env=self.environment
            )
            self._alive.add(process)
            if self._stopped:  # in between
                process.terminate()
            status = process.wait()
            self._alive.discard(process)
        return status

    def stop(self) -> None:
        """Ends what is running and begins nothing more; checkpoints and clips that stand are used by the next start."""
        self._stopped = True
        for process in tuple(self._alive):
            process.terminate()


def claim_all(grid: Grid, runs: Sequence[Run], steps: int, data: Path, output_dir: Path) -> None:
    """Composes the settings of every run, and marks its folder with them, and the output directory with what all share.

    Raises:
        UserError: settings that do not compose, or folders with runs of other settings.
    """
    evaluated = plain(compose("evaluate", grid.evaluate))
    variants = {
        (run.paper, run.variant): compose(
            "train", [*grid.train_overrides(run.paper, run.variant), *_common(steps, data)]
        )
        for run in runs
    }
    write_or_verify(
        output_dir, {"max_train_steps": steps, "data": str(data), "train": grid.train, "evaluate": grid.evaluate}
    )
    for run in runs:
        train = plain(variants[run.paper, run.variant])
        settings = dict(_dotted({"train": train, "evaluate": evaluated}))
        for key in ("train.output_dir", "train.resume_from_checkpoint", "evaluate.output_dir", "evaluate.pipeline"):
            del settings[key]
        seeded = [key for key in settings if key.rpartition(".")[2] == "seed"]
        write_or_verify(output_dir / str(run), settings | dict.fromkeys(seeded, run.seed))


def execute(run: Run, grid: Grid, steps: int, data: Path, output_dir: Path, runner: Runner) -> bool:
    """Trains and measures, unless that has been done, and writes `result.json`; returns whether it stands."""
    folder = output_dir / str(run)
    if (folder / RESULT_FILE).is_file():
        return True
    log, trained, measured = folder / "log.txt", folder / "train", folder / "evaluate"
    if not (trained / INDEX).is_file():  # which training writes last
        overrides = [*grid.train_overrides(run.paper, run.variant), *_common(steps, data)]
        overrides += [f"seed={run.seed}", f"output_dir={trained}", "resume_from_checkpoint=latest"]
        if runner("train", overrides, log):
            return False
    overrides = [*grid.evaluate, f"seed={run.seed}", f"pipeline={trained}", f"output_dir={measured}"]
    if runner("evaluate", overrides, log):
        return False
    results = json.loads((measured / RESULTS_FILE).read_text(encoding="utf-8"))
    flow_weight = load(trained / "config.yaml", "train").flow_weight
    result = {**pooled(results["parts"]), "loss": final_loss(trained, steps, flow_weight)}
    write_json(folder / RESULT_FILE, {**result, "protocol": results["protocol"], "versions": results["versions"]})
    return True


def pooled(parts: Mapping[str, Any]) -> dict[str, float]:
    """Means over the clips of all parts of an evaluation."""
    measures = {key: [part["model"][key] for part in parts.values()] for key in ("object", "motion", "psnr")}
    return {
        key: float(np.average([m["value"] for m in found], weights=[m["n"] for m in found]))
        for key, found in measures.items()
    }


def final_loss(trained: Path, steps: int, flow_weight: float) -> float:
    """Mean over the last tenth of a run's steps of the logged loss, without PredictNet's part.

    Raises:
        UserError: a step that was not logged, as when a process is killed while it writes.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = EventAccumulator(str(trained / "logs" / "microcinema"), size_guidance={"scalars": 0})
    logged.Reload()
    # By step: of one that was done twice, since its checkpoint came before it, the last counts.
    of = {
        tag: {event.step: event.value for event in logged.Scalars(tag)} if tag in logged.Tags()["scalars"] else {}
        for tag in ("loss", "loss/flow")
    }
    last = range(steps - max(1, steps // 10) + 1, steps + 1)
    if any(step not in of["loss"] for step in last):
        raise UserError(
            f"the log in '{trained}' lacks some of the steps {last[0]} to {last[-1]}; delete this folder and start again"
        )
    return float(np.mean([of["loss"][step] - flow_weight * of["loss/flow"].get(step, 0.0) for step in last]))


def _common(steps: int, data: Path) -> list[str]:
    return [f"max_train_steps={steps}", f"data.root={data}", "report_to=tensorboard"]


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# --- the outcome -----------------------------------------------------------------------------------------------------------------


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


# --- the command line ------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None, runner: Runner | None = None) -> int:
    """Runs what is chosen; returns 0, 1 if runs failed, 2 for bad input or 130 when interrupted.

    Args:
        runner: of the commands; None: `Processes`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=config_folder() / "ablation" / "sprites.yaml")
    parser.add_argument("--papers", nargs="+", help="of the grid; all without it")
    parser.add_argument("--variants", nargs="+", help="of the grid; all without it")
    parser.add_argument("--seeds", nargs="+", type=int, help="those of the grid without it")
    parser.add_argument("--steps", type=int, help="of each training; those of the grid without it")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--data", type=Path, default=Path("runs/data/sprites"), help="what `prepare` wrote")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--table", action="store_true", help="run nothing; draw what stands")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers is {arguments.workers}; use 1 or more")
    try:
        grid = load_grid(arguments.grid)
        failed = 0
        if not arguments.table:
            runs = choose(grid, arguments.papers, arguments.variants, arguments.seeds or grid.seeds)
            steps = grid.max_train_steps if arguments.steps is None else arguments.steps
            if not arguments.data.is_dir():
                raise UserError(f"there is no data set '{arguments.data}'; --help says how to make one")
            failed = run_all(runs, grid, steps, arguments.data, arguments.output_dir, arguments.workers, runner)
        publish(grid, arguments.output_dir)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 1 if failed else 0


def run_all(
    runs: Sequence[Run],
    grid: Grid,
    steps: int,
    data: Path,
    output_dir: Path,
    workers: int = 1,
    runner: Runner | None = None,
) -> int:
    """Does every run whose result does not stand, so many at once, and returns how many failed.

    Raises:
        UserError: as `claim_all`; then nothing has been run.
    """
    claim_all(grid, runs, steps, data, make_folder(output_dir))
    processes = Processes(workers)
    begun, failed = time.monotonic(), 0
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(execute, run, grid, steps, data, output_dir, runner or processes): run for run in runs}
        try:
            for number, future in enumerate(as_completed(waiting), 1):
                run = waiting[future]
                try:
                    outcome = "stands" if future.result() else f"failed; see {output_dir / str(run) / 'log.txt'}"
                except UserError as error:
                    outcome = f"failed: {error}"
                failed += outcome != "stands"
                print(f"{time.monotonic() - begun:6.0f} s  {number}/{len(runs)}  {run}: {outcome}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return failed


if __name__ == "__main__":
    # Ended from outside, it ends its runs as well: left behind, they would write where the next start does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
