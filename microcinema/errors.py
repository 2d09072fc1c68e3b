"""The one exception type that this package raises for bad input."""


class UserError(Exception):
    """Bad input, told in one line: what is wrong, with which value, and what to do about it.

    The command line prints the message without a traceback and exits with code 2.
    """
