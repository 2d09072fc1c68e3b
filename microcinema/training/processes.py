"""Processes of one run that agree: on what the main one finds, and on an error that one of them meets."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from microcinema.utils.errors import UserError

T = TypeVar("T")


def broadcast_from_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What the function returns in the main process, in every process; called in all of them, it runs in that one.

    Raises:
        UserError: the function's, in every process.
    """
    found: list[tuple[T | None, str | None]] = [(None, None)]
    if accelerator.is_main_process:
        try:
            found = [(function(), None)]
        except UserError as error:
            found = [(None, str(error))]
    broadcast_object_list(found)
    value, message = found[0]
    if message is not None:
        raise UserError(message)
    return value  # type: ignore[return-value]


def first_error(fault: str | None) -> str | None:
    """What went wrong in the first of all processes in which something did; called in all of them."""
    return next((each for each in gather_object([fault]) if each is not None), None)
