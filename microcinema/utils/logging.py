"""Notices of this package and of the libraries."""

import functools
import logging


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, if this process has not done so before."""
    logging.getLogger("microcinema").warning(message)


def quieten_libraries() -> None:
    """Turns off the notices and loading bars of diffusers and transformers, which tell a user of the commands nothing."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
