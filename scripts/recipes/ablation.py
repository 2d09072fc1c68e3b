"""The ablation grid: trains and measures every variant of every paper for several seeds, and draws one table and one figure.

    microcinema prepare sprites num_videos=6000 rotation_weight=4
    microcinema prepare latents experiment=sprites_factorized_dreamer "cached_parts=[keyframe, flow]"
    python -m scripts.recipes.ablation --workers 2

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
from pathlib import Path
from typing import Any

import numpy as np

from microcinema.config.compose import compose, load, plain
from microcinema.config.help import config_folder
from microcinema.pipelines.loading import INDEX
from microcinema.sprites.evaluate import RESULTS_FILE
from microcinema.utils.errors import UserError
from microcinema.utils.files import make_folder, write_json
from microcinema.utils.fingerprint import write_or_verify
from scripts.recipes.ablation_grid import Grid, Run, choose, load_grid
from scripts.recipes.ablation_report import RESULT_FILE, publish

INTERRUPTED = 130
LAUNCHERS = Path(__file__).parents[1]
"""The folder with a script for each command."""


Runner = Callable[[str, Sequence[str], Path], int]
"""Runs a command (`train`, `evaluate`) with overrides, writes what it says to a file, and returns its exit status."""


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
        script = LAUNCHERS / f"{command}.py"
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


def mark_all(grid: Grid, runs: Sequence[Run], steps: int, data: Path, output_dir: Path) -> None:
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
        UserError: as `mark_all`; then nothing has been run.
    """
    mark_all(grid, runs, steps, data, make_folder(output_dir))
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
