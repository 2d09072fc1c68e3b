"""The command line: `microcinema <command> key=value ...`."""

import argparse
import gc
import importlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from microcinema import __version__
from microcinema.config.help import config_folder, describe_keys, file_of
from microcinema.utils.errors import OneLineError, UserError, disk_fault
from microcinema.utils.files import lock_folder


@dataclass(frozen=True)
class Command:
    """One command: `run(config)` of the module in this folder that is named as it, which returns the exit status (None: 0).

    Attributes:
        config: the command whose keys it takes; None: it has its own, in `configs/` and in `schema`.
        folder: the key of the folder that it writes, which one process holds at a time; None: it writes none.
        one_of: keys of which exactly one has to be set.
        files: keys that name an existing file or folder, if they are set.
        takes: the key that the first word behind the command sets, `microcinema watch runs`; None: every word names its key.
    """

    meaning: str
    config: str | None = None
    dry_run: bool = False
    folder: str | None = "output_dir"
    one_of: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    takes: str | None = None

    def check(self, config: Any) -> None:
        """Refuses a key that is not set and a file that is not there, before anything heavy is imported, and what a component does not take."""
        values = {key: getattr(config, key) for key in (*self.one_of, *self.files)}
        if self.one_of and sum(bool((values[key] or "").strip()) for key in self.one_of) != 1:
            keys = " and ".join(f"{key}=" for key in self.one_of)
            raise UserError(f"give {'one of ' * (len(self.one_of) > 1)}{keys}")
        for key in self.files:
            path = Path(values[key] or ".")
            if not (path.is_file() or path.is_dir()):  # a pipe or a device would never end
                raise UserError(f"{key} '{path}' is {'no file' if path.exists() else 'not there'}; check the path")
        from microcinema.config.instantiate import named_components

        components = dict(named_components(config))
        if held_out := getattr(config, "validation_data", None):
            components["validation_data"] = replace(config.data, arguments={**config.data.arguments, **held_out})
        for key, component in components.items():  # which imports their targets
            component.check(key)


COMMANDS = {
    "train": Command("train the video model", dry_run=True),
    "sample": Command("make videos from prompts or images", one_of=("prompt", "prompts"), files=("prompts", "image")),
    "evaluate": Command("generate videos, measure them, write a report", files=("generated_dir",)),
    "sweep": Command("train and evaluate the variants of a grid, write one table"),
    "prepare sprites": Command("render a Moving Sprites data set"),
    "prepare check": Command("check the clips of a data set and report faults"),
    "prepare preview": Command("draw clips and captions as the model gets them", folder=None),
    "prepare latents": Command(
        "encode the clips of a training run, with the keys of that run",
        folder="cached_latents",
        one_of=("cached_latents",),
    ),
    "export": Command("write a pipeline folder from a checkpoint", one_of=("checkpoint",), files=("checkpoint",)),
    "ui": Command("make videos on a page in the browser"),
    "doctor": Command(
        "check whether train can run here with the same keys, and what it needs", config="train", folder=None
    ),
    "watch": Command(
        "show training runs in the browser: curves, videos, configs", folder=None, files=("folder",), takes="folder"
    ),
}
GRACE_SECONDS = 5.0  # in which a launcher ends the other processes of a run when one has failed


def overview(group: str = "") -> str:
    """The commands, or those that begin with a word such as `prepare`, with their meanings."""
    names = [name for name in COMMANDS if name.startswith(group)]
    return "\n".join(["commands:", *(f"  {name:17}{COMMANDS[name].meaning}" for name in names)])


def command_help(command: str, overrides: Sequence[str] = ()) -> str:
    """The keys of a command with values and meanings: the defaults, or those of the composition with overrides."""
    entry = COMMANDS[command]
    dry = "[--dry-run] " if entry.dry_run else ""
    composition: tuple[Any, ...] = ()
    if overrides:
        from microcinema.config.compose import compose_with_choices, plain

        config, choices = compose_with_choices(entry.config or command, overrides)
        composition = plain(config), choices
    usage = f"usage: microcinema {command} [key=value ...] {dry}[--print-config] [--traceback]"
    return "\n".join([usage, "", f"{entry.meaning}.", "", *describe_keys(entry.config or command, *composition)])


def merge_subcommand(arguments: Sequence[str]) -> list[str]:
    """The arguments with a command of two words, such as `prepare check`, as one, and the word that a command takes with its key."""
    both = " ".join(arguments[:2])
    command, *words = [both, *arguments[2:]] if both in COMMANDS else arguments or [""]
    if command in COMMANDS and (key := COMMANDS[command].takes) and words and not re.match(r"-|[\w.]+=", words[0]):
        words[0] = f"{key}={words[0]}"
    return [command, *words] if arguments else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status, 2 for bad input (one line on stderr) or 130 when interrupted."""
    arguments = merge_subcommand(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if arguments[:1] == ["prepare"]:
        print(f"usage: microcinema prepare <what> [key=value ...]\n\n{overview('prepare')}")
        return 0 if {*arguments} & {"-h", "--help"} else 2
    options = parser.parse_intermixed_args(arguments)
    if options.config_dir:
        print(config_folder())
        return 0
    if options.command is None:
        print(parser.format_help().rstrip())
        return 0 if options.help else 2
    if options.dry_run and not COMMANDS[options.command].dry_run:
        parser.error(f"--dry-run is for {', '.join(name for name in COMMANDS if COMMANDS[name].dry_run)} only")
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="microcinema",
        usage="microcinema <command> [key=value ...] [--help] [--print-config] [--traceback]",
        description=f"Text-to-video in two steps: text to key frame, key frame to video.\n\n{overview()}",
        epilog="`microcinema <command> key=value ... --help` lists the keys of a command and their values.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    # One line, as of all bad input, without the usage.
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # type: ignore[assignment, method-assign, return-value]
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS, metavar="command")
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    for names, text in {
        ("-h", "--help"): "show this, or the keys of a command",
        ("--print-config",): "print the composed config as YAML, and nothing else",
        ("--config-dir",): "print the folder of the YAML files, which has accelerate/ as well",
        ("--dry-run",): "train: a few steps of everything, and from them what the run needs; nothing is kept",
        ("--traceback",): "show where an error came from",
    }.items():
        parser.add_argument(*names, action="store_true", help=text)
    parser.add_argument("--version", action="version", version=__version__, help="show the version")
    return parser


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(options: argparse.Namespace) -> int:
    command, composed, folder = COMMANDS[options.command], False, None
    try:
        if options.help:
            _print(command_help(options.command, options.overrides))
            return 0
        from microcinema.config.compose import compose, to_yaml

        config = compose(command.config or options.command, options.overrides)
        if options.print_config:
            _print(to_yaml(config).rstrip())
            return 0
        # Otherwise transformers warns of each image processor that it would rather have torchvision for.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # A tracker that cannot write fails in its own thread first, and then in the main one, which tells it.
        threading.excepthook = _thread_failed
        command.check(config)
        composed = True
        name = "dry_run" if options.dry_run else file_of(options.command)
        folder = getattr(config, command.folder or "", None)
        with lock_folder(folder) if folder and os.environ.get("RANK", "0") == "0" else nullcontext():
            return import_command(f"microcinema.commands.{name}").run(config) or 0
    except Exception as error:
        fault = error if isinstance(error, OneLineError) else disk_fault(error, folder)
        if fault is None:
            raise
        _report(fault, options.traceback, same_everywhere=not composed)
        return 2


def import_command(name: str) -> Any:
    """The module of a command, with torch and diffusers or Gradio, whose objects stay: searching them for garbage takes a fifth of a start."""
    if name in sys.modules:
        return importlib.import_module(name)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()  # later collections leave them out as well
        gc.enable()


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def _report(error: OneLineError | str, with_traceback: bool, same_everywhere: bool) -> None:
    """Prints an error in one line, once for all processes of a run.

    One that is not the main process waits: when that one has failed as well, the launcher ends this one before it prints. If it ended at
    once, the launcher would end the main process, perhaps before that prints. Every process finds the same fault in a config.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_SECONDS)
    if rank and same_everywhere:
        return
    if with_traceback:
        traceback.print_exc()
    where = f" (process {rank})" if rank else ""
    print(f"error{where}:", " ".join(str(error).split()), file=sys.stderr)
