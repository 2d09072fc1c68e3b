"""The command `ui`: serves the studio, and makes what is asked for there by the code of `sample`, in another process."""

from importlib.util import find_spec

from microcinema.commands.cli import COMMANDS, import_command
from microcinema.config.compose import compose
from microcinema.config.schema import Sample, Ui
from microcinema.ui.jobs import JobQueue, Report
from microcinema.utils.errors import UserError
from microcinema.utils.files import make_folder


def run(config: Ui) -> None:
    """Serves the page until it is interrupted; a UserError without Gradio, or at a port that is taken."""
    if find_spec("gradio") is None:
        raise UserError('the studio needs Gradio, which is not installed; pip install "microcinema[ui]"')
    serve = import_command("microcinema.ui.page").serve
    queue = JobQueue(make_folder(config.output_dir), make_samples, check)
    try:
        serve(config, queue)
    finally:
        queue.close()


def check(overrides: list[str]) -> Sample:
    """The config of a job, refused as by the command `sample`."""
    config = compose("sample", overrides)
    COMMANDS["sample"].check(config)
    return config


def make_samples(overrides: list[str], report: Report) -> None:
    """A job of the queue, as by the command `sample`; `report` is told each step."""
    from microcinema.commands import sample  # with torch, which the server does without

    sample.run(check(overrides), report)
