"""The command `sweep`: trains and evaluates every variant of a grid for several seeds, and writes one table of them.

A run is `microcinema train` and then `microcinema evaluate`, each a process of its own in `<output_dir>/<variant>/seed-<n>`. The same command resumes: what is
done is skipped, an interrupted training continues from its last checkpoint, an evaluation from its clips.
"""

import itertools
import json
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from microcinema.commands.cli import COMMANDS
from microcinema.config.compose import compose, plain
from microcinema.config.schema import Sweep, Train
from microcinema.evaluation.measures import Measure
from microcinema.evaluation.sweep_table import HELD_OUT, evaluation_figures, write_tables
from microcinema.training.heldout_loss import RECORD
from microcinema.training.preemption import EXIT_STATUS
from microcinema.utils.errors import UserError
from microcinema.utils.files import write_json
from microcinema.utils.fingerprint import write_or_verify
from microcinema.utils.processes import Processes
from microcinema.utils.provenance import describe_code

COMMAND = ("-m", "microcinema")
OWN_KEYS = {
    "train": {"seed", "output_dir", "resume_from_checkpoint"},
    "evaluate": {"seed", "output_dir", "compare"},
}
Runner = Callable[[Sequence[str], Path], int]
"""Gives Python these arguments, appends what is said to a file, and returns the exit status."""


@dataclass(frozen=True)
class Step:
    """A command of a run, by what Python is given. It is done when `<name>.json` is in the folder of the run, with its figures.

    Attributes:
        read: of the folder `name`, figures by key and what they mean.
    """

    name: str
    arguments: Sequence[str]
    read: Callable[[Path], tuple[dict[str, float], Sequence[Measure]]]


@dataclass(frozen=True)
class Run:
    """One variant with one seed, in a folder of its own."""

    variant: str
    seed: int
    folder: Path
    steps: Sequence[Step]

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    def records(self) -> list[dict[str, Any]]:
        """Those of the steps that are done."""
        files = [self.folder / f"{step.name}.json" for step in self.steps]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def run(config: Sweep) -> int:
    """Does what is not done of all runs, and writes the table after each; returns 1 if runs failed, otherwise 0.

    Raises:
        UserError: as `plan`; then nothing has been started.
    """
    return run_all(config, plan(config))


def run_all(config: Sweep, runs: Sequence[Run], runner: Runner | None = None) -> int:
    """`run` of what has been planned; by processes, if no runner is given."""
    processes = Processes(config.workers, config.launch)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a sweep that is ended ends its runs
    begun, failed, versions = time.monotonic(), 0, describe_code()
    try:
        with ThreadPoolExecutor(config.workers) as pool:
            waiting = {pool.submit(execute, each, runner or processes, versions): each for each in runs}
            try:
                for number, future in enumerate(as_completed(waiting), 1):
                    error = future.exception()
                    if error is not None and not isinstance(error, UserError):
                        raise error
                    failed += error is not None
                    outcome = "done" if error is None else f"failed: {error}"
                    seconds = f"{time.monotonic() - begun:6.0f} s"
                    print(f"{seconds}  {number}/{len(runs)}  {waiting[future]}: {outcome}", flush=True)
                    table = write(config, runs)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                processes.stop()
                raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(f"{table}{config.output_dir}/sweep.md")
    return min(failed, 1)


def variants(config: Sweep) -> dict[str, list[str]]:
    """The keys that each variant sets, by its name, in the order of the table. Keys of one value have no part in the names.

    Raises:
        UserError: two variants whose folders would have one name.
    """
    axes = [list((config.variants or {"": []}).items())]
    for key, values in (config.grid or {}).items():
        overrides = [f"{key}={_text(value)}" for value in values]
        axes.append([(override if len(values) > 1 else "", [override]) for override in overrides])
    found: dict[str, list[str]] = {}
    for cell in itertools.product(*axes):
        name = ",".join(filter(None, (name for name, _ in cell))) or "default"
        if _folder(name) in map(_folder, found):
            raise UserError(f"two variants are called '{_folder(name)}'; name them in variants={{name: [key=value]}}")
        found[name] = [override for _, overrides in cell for override in overrides]
    return found


def _text(value: Any) -> str:
    """A value of YAML as the command line takes it."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _folder(variant: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "_", variant)[:120]


def plan(config: Sweep, more: Callable[[Path], Sequence[Step]] = lambda _: ()) -> list[Run]:
    """All runs, seed by seed, so that a sweep that is broken off is narrow, not short; their settings are checked, and their folders marked.

    Args:
        more: further steps of the run in a folder, after its training and evaluation.

    Raises:
        UserError: settings of a run that do not compose, or folders with runs of other settings.
    """
    commands = {name: getattr(config, name) for name in OWN_KEYS if getattr(config, name) is not None}
    if not commands:
        raise UserError("train and evaluate are null; give one of them, such as evaluate=[evaluation=sprites]")
    first, *_ = commands  # whose keys the variants change
    shared = {
        command: _check("evaluate", command, told, config) for command, told in commands.items() if command != first
    }
    checked, overrides = {}, {}
    for name, changes in variants(config).items():
        overrides[name] = commands | {first: [*commands[first], *changes]}
        checked[name] = {first: _check(name, first, overrides[name][first], config), **shared}
    runs = []
    for seed in dict.fromkeys(config.seeds):
        for name, composed in checked.items():
            folder = Path(config.output_dir, _folder(name), f"seed-{seed}")
            for command, settings in composed.items():
                write_or_verify(folder / command, plain(settings))
            tracked = [f"tracker.group={Path(config.output_dir).resolve().name}", f"tracker.name={name}, seed {seed}"]
            steps = _steps(folder, seed, overrides[name], composed.get("train"), tracked)
            runs.append(Run(name, seed, folder, [*steps, *more(folder)]))
    return runs


def _check(variant: str, command: str, overrides: Sequence[str], config: Sweep) -> Any:
    """The settings of a command of a variant."""
    own = OWN_KEYS[command] | ({"pipeline"} if command == "evaluate" and config.train is not None else set())
    if taken := own.intersection(override.partition("=")[0] for override in overrides):
        fault = f"{variant}: the sweep sets {min(taken)} of {command} itself"
        raise UserError(f"{fault}; leave it out, and use seeds and output_dir")
    try:
        settings = compose(command, overrides)
        COMMANDS[command].check(settings)
    except UserError as error:
        raise UserError(f"{variant}: {error}") from None
    if command == "train" and config.evaluate is None and settings.validation_data is None:
        raise UserError(f"{variant}: nothing is measured; give evaluate=[...], or validation_data in train")
    return settings


def _steps(
    folder: Path, seed: int, overrides: Mapping[str, Sequence[str]], settings: Train | None, tracked: Sequence[str]
) -> Iterator[Step]:
    """Training, if there are settings of it, and evaluation of what it leaves."""
    trained, model = folder / "train", []
    if settings is not None:
        own = [f"seed={seed}", f"output_dir={trained}", "resume_from_checkpoint=latest"]
        yield Step("train", [*COMMAND, "train", *tracked, *overrides["train"], *own], _held_out_figures)
        base = settings.init_weights_from
        model = [f"pipeline={trained}"] if settings.lora is None else [f"pipeline={base}", f"lora=[{trained}]"]
    if "evaluate" in overrides:
        own = [*model, f"seed={seed}", f"output_dir={folder / 'evaluate'}"]
        yield Step("evaluate", [*COMMAND, "evaluate", *overrides["evaluate"], *own], evaluation_figures)


def _held_out_figures(trained: Path) -> tuple[dict[str, float], Sequence[Measure]]:
    if not (trained / RECORD).is_file():
        return {}, ()
    *_, last = json.loads((trained / RECORD).read_text(encoding="utf-8"))
    return {key: value for key, value in last.items() if key != "step"}, HELD_OUT


def execute(run: Run, runner: Runner, versions: Mapping[str, Any]) -> None:
    """Does the steps that are not done. Raises a UserError, in one line, if one fails."""
    log = run.folder / "log.txt"
    for step in run.steps:
        if (record := run.folder / f"{step.name}.json").is_file():
            continue
        begin = log.stat().st_size if log.is_file() else 0
        while (status := runner(step.arguments, log)) == EXIT_STATUS:
            pass  # preempted; it has saved, and goes on
        if status:
            said = log.read_bytes()[begin:].decode(errors="replace").split("\n") if log.is_file() else []
            # A launcher has its own last words, behind those of the command.
            errors = [line for line in said if line.startswith("error:")] or [line for line in said if line.strip()]
            raise UserError(f"exit status {status}, '{errors[-1] if errors else ''}'; see {log}")
        figures, measures = step.read(run.folder / step.name)
        known = [asdict(measure) for measure in measures if measure.key in figures]
        write_json(record, {"figures": figures, "measures": known, "versions": versions})


def write(config: Sweep, runs: Iterable[Run]) -> str:
    """Writes the table of what is done; returns it as Markdown."""
    figures: dict[str, dict[int, dict[str, float]]] = {}
    measures: dict[str, Measure] = {}
    for run in runs:
        records = run.records()
        cells = figures.setdefault(run.variant, {})
        if records:
            cells[run.seed] = {key: value for record in records for key, value in record["figures"].items()}
        measures |= {entry["key"]: Measure(**entry) for record in records for entry in record["measures"]}
        measures |= {
            key: Measure(key, key, "") for record in records for key in record["figures"] if key not in measures
        }
    return write_tables(Path(config.output_dir), figures, measures, config.measures)
