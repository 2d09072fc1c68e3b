"""Notices of the libraries."""


def quieten_libraries() -> None:
    """Turns off the notices and loading bars of diffusers and transformers, which tell a user of the commands nothing."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
