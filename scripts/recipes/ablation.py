"""The ablation grid: trains and measures every variant of every paper for several seeds, and draws one table and two figures.

    microcinema prepare sprites num_videos=6000 rotation_weight=4
    microcinema prepare sprites split=heldout num_videos=32 rotation_weight=4 output_dir=runs/data/sprites_heldout
    microcinema prepare latents experiment=sprites_factorized_dreamer "cached_parts=[keyframe, flow]"
    python -m scripts.recipes.ablation --workers 2

The grid is `configs/ablation/sprites.yaml`. A run is `train`, which logs the held-out loss, and then `benchmarks.sprites text_sensitivity`; with `--judged`
it is `evaluate` as well, whose sampled videos take longer. Each is a process of its own, in `<output-dir>/<paper>/<variant>/seed-<n>`. Started again, the grid
resumes: a run whose result stands is skipped, an interrupted training resumes from its last checkpoint, and `--judged` adds what is missing. Settings of every
run of an output directory are the same but for what its variant changes; others are refused. `ablation.md`, `ablation.json`, `ablation.png` and
`ablation_curves.png` are drawn after the last run, and by `--table` at any time from the results there are.

A measurement of the 32 held-out clips takes some 20 s on one core, six of them two minutes of each run, and text sensitivity 45 s.
Runs compare at equal steps, and at equal time of training by the median pace of each; for that they should share the machine alike.
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

from microcinema.config.compose import compose, plain
from microcinema.config.help import config_folder
from microcinema.pipelines.loading import INDEX
from microcinema.sprites.dataset import CSV_FILE
from microcinema.sprites.evaluate import RESULTS_FILE
from microcinema.utils.errors import UserError
from microcinema.utils.files import make_folder, write_json
from microcinema.utils.fingerprint import write_or_verify
from microcinema.utils.provenance import describe_code
from scripts.recipes.ablation_curves import read_curves
from scripts.recipes.ablation_grid import Grid, Run, choose, load_grid
from scripts.recipes.ablation_report import RESULT_FILE, publish

INTERRUPTED = 130
ROOT = Path(__file__).parents[2]
COMMANDS = {
    "train": [str(ROOT / "scripts/train.py")],
    "evaluate": [str(ROOT / "scripts/evaluate.py")],
    "benchmark": ["-m", "benchmarks.sprites"],
}
"""What Python is given to run each command."""

Runner = Callable[[str, Sequence[str], Path], int]
"""Runs `train`, `evaluate` or `benchmark` with arguments, writes what it says to a file, and returns its exit status."""


@dataclass(frozen=True)
class Plan:
    """What all runs have in common.

    Attributes:
        data, held_out: folders of Moving Sprites, for training and for the held-out loss.
        judged: whether videos are sampled and judged as well.
    """

    grid: Grid
    steps: int
    data: Path
    held_out: Path
    output_dir: Path
    judged: bool

    def train_overrides(self, run: Run) -> list[str]:
        """What a run's `train` is told, but for seed and folders."""
        held_out = f"validation_data={{root: {self.held_out}, metadata: {self.held_out / CSV_FILE}}}"
        common = [f"max_train_steps={self.steps}", f"data.root={self.data}", held_out, "report_to=tensorboard"]
        return [*self.grid.train_overrides(run.paper, run.variant), *common]


class Processes:
    """A `Runner` that gives every command a process: what fails, fails alone, and its memory is given back."""

    def __init__(self, workers: int) -> None:
        threads = max(1, (os.cpu_count() or 1) // workers)
        # As in the Makefile: the C library otherwise hands each large buffer back to the kernel and faults it in again.
        malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
        # Progress once in a minute: it goes to a file.
        self.environment = {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "60", **malloc, **os.environ}
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def __call__(self, command: str, arguments: Sequence[str], log: Path) -> int:
        if self._stopped:
            return INTERRUPTED
        line = [sys.executable, *COMMANDS[command], *arguments]
        with log.open("ab") as file:
            process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=self.environment)
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


def mark_all(plan: Plan, runs: Sequence[Run]) -> None:
    """Composes the settings of every run, and marks its folder with them, and the output directory with what all share.

    Raises:
        UserError: settings that do not compose, or folders with runs of other settings.
    """
    grid, evaluated = plan.grid, plain(compose("evaluate", plan.grid.evaluate))
    trained = {(run.paper, run.variant): plain(compose("train", plan.train_overrides(run))) for run in runs}
    common = {"max_train_steps": plan.steps, "data": str(plan.data), "held_out": str(plan.held_out)}
    lists = {"train": grid.train, "text_sensitivity": grid.text_sensitivity, "evaluate": grid.evaluate}
    write_or_verify(plan.output_dir, common | lists)
    for run in runs:
        settings = dict(_dotted({"train": trained[run.paper, run.variant], "evaluate": evaluated}))
        for key in ("train.output_dir", "train.resume_from_checkpoint", "evaluate.output_dir", "evaluate.pipeline"):
            del settings[key]
        seeded = [key for key in settings if key.rpartition(".")[2] == "seed"]
        write_or_verify(plan.output_dir / str(run), settings | dict.fromkeys(seeded, run.seed))


def execute(run: Run, plan: Plan, runner: Runner) -> bool:
    """Trains and measures, unless that has been done, and writes `result.json`; returns whether it stands."""
    folder = plan.output_dir / str(run)
    file, log, trained = folder / RESULT_FILE, folder / "log.txt", folder / "train"
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not result:
        if not (trained / INDEX).is_file():  # which training writes last
            own = [f"seed={run.seed}", f"output_dir={trained}", "resume_from_checkpoint=latest"]
            if runner("train", [*plan.train_overrides(run), *own], log):
                return False
        figures = folder / "text_sensitivity.json"
        options = ["--pipeline", str(trained), *plan.grid.text_sensitivity]
        if runner("benchmark", ["--json", str(figures), "text_sensitivity", *options], log):
            return False
        (curves, wall_seconds), text = read_curves(trained), json.loads(figures.read_text(encoding="utf-8"))
        last = {name: values[-1] for name, values in curves.items()} | {"wall_seconds": wall_seconds}
        result = {**last, "text_sensitivity": text["text_sensitivity"], "text": text, "curves": curves}
        write_json(file, {**result, "versions": describe_code()})
    if plan.judged and "object" not in result:
        measured = folder / "evaluate"
        own = [f"seed={run.seed}", f"pipeline={trained}", f"output_dir={measured}"]
        if runner("evaluate", [*plan.grid.evaluate, *own], log):
            return False
        judged = json.loads((measured / RESULTS_FILE).read_text(encoding="utf-8"))
        result = json.loads(file.read_text(encoding="utf-8")) | pooled(judged["parts"])
        write_json(file, {**result, "protocol": judged["protocol"]})
    return True


def pooled(parts: Mapping[str, Any]) -> dict[str, float]:
    """Means over the clips of all parts of an evaluation."""
    measures = {key: [part["model"][key] for part in parts.values()] for key in ("object", "motion", "psnr")}
    return {
        key: float(np.average([m["value"] for m in found], weights=[m["n"] for m in found]))
        for key, found in measures.items()
    }


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


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
    parser.add_argument(
        "--held-out", type=Path, default=Path("runs/data/sprites_heldout"), help="clips whose loss is measured"
    )
    parser.add_argument("--judged", action="store_true", help="sample videos of every run and judge them as well")
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
            for folder in (arguments.data, arguments.held_out):
                if not folder.is_dir():
                    raise UserError(f"there is no data set '{folder}'; --help says how to make one")
            folders = arguments.data, arguments.held_out, arguments.output_dir
            failed = run_all(runs, Plan(grid, steps, *folders, arguments.judged), arguments.workers, runner)
        publish(grid, arguments.output_dir)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 1 if failed else 0


def run_all(runs: Sequence[Run], plan: Plan, workers: int = 1, runner: Runner | None = None) -> int:
    """Does every run whose result does not stand, so many at once, and returns how many failed.

    Raises:
        UserError: as `mark_all`; then nothing has been run.
    """
    make_folder(plan.output_dir)
    mark_all(plan, runs)
    processes = Processes(workers)
    begun, failed = time.monotonic(), 0
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(execute, run, plan, runner or processes): run for run in runs}
        try:
            for number, future in enumerate(as_completed(waiting), 1):
                run = waiting[future]
                try:
                    outcome = "stands" if future.result() else f"failed; see {plan.output_dir / str(run) / 'log.txt'}"
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
