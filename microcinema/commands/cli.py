"""The command line: `microcinema <command> key=value ...`."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from microcinema import __version__
from microcinema.config.compose import compose, documented_keys, group_defaults, group_options
from microcinema.utils.errors import UserError

# Imported when called: each brings torch along.
BODIES = {
    "train": ("microcinema.commands.train", "train the video model"),
    "sample": ("microcinema.commands.sample", "make videos from prompts or images"),
    "evaluate": ("microcinema.commands.evaluate", "generate videos, measure them, write a report"),
    "prepare": ("microcinema.commands.prepare_sprites", "render a Moving Sprites data set"),
    "prepare check": (
        "microcinema.commands.prepare_check",
        "look at the clips of a data set and say what is wrong with them",
    ),
    "prepare preview": (
        "microcinema.commands.prepare_preview",
        "draw clips as the model will see them, with their captions",
    ),
    "prepare latents": (
        "microcinema.commands.prepare_latents",
        "encode the clips of a training run once, with the keys of that run",
    ),
    "export": ("microcinema.commands.export", "make a pipeline folder of a training checkpoint"),
    "doctor": ("microcinema.commands.doctor", "say whether train can run here with the same keys, and what it needs"),
}
DRY_RUNS = {"train": "microcinema.commands.dry_run"}


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:17}{meaning}" for name, (_, meaning) in BODIES.items())
    parser = argparse.ArgumentParser(
        prog="microcinema",
        usage="microcinema <command> [key=value ...] [--traceback]",
        description=f"Text-to-video in two steps: text to key frame, key frame to video.\n\ncommands:\n{commands}",
        epilog="`microcinema <command> --help` lists the keys of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("command", nargs="?", choices=BODIES, help=argparse.SUPPRESS, metavar="command")
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true", help="show this, or the keys of a command")
    parser.add_argument(
        "--dry-run", action="store_true", help="train: a few steps of everything, what the run will take, nothing kept"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--version", action="version", version=__version__, help="show the version")
    return parser


def command_help(command: str) -> str:
    """The keys of a command with their defaults and meanings, and those of its groups' default options."""
    dry = "[--dry-run] " if command in DRY_RUNS else ""
    lines = [f"usage: microcinema {command} [key=value ...] {dry}[--traceback]", "", f"{BODIES[command][1]}.", ""]
    groups = group_defaults(command)

    def describe(rows: list[tuple[str, str, str]]) -> None:
        for key, value, meaning in rows:
            lines.append(f"  {f'{key}={value}':40} {meaning}")
        lines.append("")

    rows = list(documented_keys(command))
    if groups:
        lines.append("groups:")
        for key, value, meaning in rows:
            if key in groups:
                lines.append(f"  {f'{key}={value}':40} {meaning}: {', '.join(group_options(key))}")
        lines.append("")
    lines.append("keys:")
    describe([row for row in rows if row[0] not in groups])
    for group, option in groups.items():
        if option is not None:
            lines.append(f"keys of {group}={option}:")
            inside = documented_keys(f"{group}/{option}")
            describe([(f"{group}.{key}", value, meaning) for key, value, meaning in inside])
    return "\n".join(lines).rstrip()


def joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with a command of two words, such as `prepare check`, as one."""
    both = " ".join(arguments[:2])
    return [both, *arguments[2:]] if both in BODIES else list(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, what `doctor` returns, 2 for bad input (told in one line on stderr) or 130 when interrupted."""
    parser = _parser()
    options = parser.parse_intermixed_args(joined(sys.argv[1:] if arguments is None else arguments))
    if options.help or options.command is None:
        print(command_help(options.command) if options.command else parser.format_help().rstrip())
        return 0 if options.help else 2
    if options.dry_run and options.command not in DRY_RUNS:
        parser.error(f"--dry-run is for {', '.join(DRY_RUNS)}, not for {options.command}")
    body = DRY_RUNS[options.command] if options.dry_run else BODIES[options.command][0]
    # Otherwise transformers warns of each image processor that it would rather have torchvision for.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        composed = compose(options.command, options.overrides)
        return importlib.import_module(body).run(composed) or 0
    except UserError as error:
        if options.traceback:
            traceback.print_exc()
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
