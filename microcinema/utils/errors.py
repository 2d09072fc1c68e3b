"""The exceptions that the command line tells in one line: of bad input, and of the machine."""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any


class OneLineError(Exception):
    """What is wrong, with which value, and what to do about it, in one line, which the command line prints without a traceback; exit code 2."""

    def __init__(self, message: str):
        # A DataLoader re-raises its worker's error with the worker's whole traceback as the message.
        super().__init__(message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].strip())


class UserError(OneLineError):
    """Bad input."""


class MachineError(OneLineError):
    """A fault of the machine, such as its disk or a package that is missing, for which no clip is to blame: the run ends, to be continued."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class if it has none: what fits into another message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def user_errors(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Within it an exception of these kinds becomes a UserError, in whose message `{reason}` is its first line.

    Without kinds any does, but for lack of memory: around what opens a file or another thing of the user's, for which libraries have a
    dozen kinds. Errors in one line pass as they are.
    """
    try:
        yield
    except OneLineError:
        raise
    except Exception as error:
        lacks_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
        if not isinstance(error, kinds) if kinds else lacks_memory:
            raise
        reason = repr(error) if isinstance(error, KeyError) else first_line(error)  # of a KeyError the key alone
        raise UserError(message.replace("{reason}", reason)) from error


def disk_fault(error: BaseException, folder: str | None) -> str | None:
    """A full disk, missing permissions and the like in one line, with the file, or else the folder; None for errors of another kind."""
    text = str(error).strip() or type(error).__name__
    # safetensors and torch have errors of their own for them.
    if not isinstance(error, OSError) and not re.search("SafetensorError|PytorchStream|No space left", repr(error)):
        return None
    name, reason = getattr(error, "filename", None) or folder or "a file", getattr(error, "strerror", None)
    fault = f"cannot read or write '{os.fsdecode(name)}' ({reason or text.splitlines()[-1]})"
    return f"{fault}; free disk space or check the permissions, and run the command again"


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Refuses a value that is none of the choices with a UserError that names them."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is not known; choose one of {', '.join(map(str, choices))}")
