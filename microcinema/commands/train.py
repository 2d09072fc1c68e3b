"""The command `train`: trains the video model that the config describes."""

from collections.abc import Callable

from microcinema.config.schema import Train
from microcinema.training.build import build_trainer
from microcinema.training.preemption import EXIT_STATUS, Preempted


def run(config: Train, on_metrics: Callable[[dict[str, float]], None] | None = None) -> int:
    """Builds accelerator, networks, data and trainer, and trains; by every process of a distributed run.

    Returns:
        The exit status: 0, or `EXIT_STATUS` after a preemption, to be continued with resume_from_checkpoint=latest.

    Raises:
        UserError: the config describes something that cannot be built or trained.
    """
    trainer, status = build_trainer(config, on_metrics), 0
    try:
        trainer.train()
    except Preempted as error:
        trainer.accelerator.print(f"{error}; continue with resume_from_checkpoint=latest")
        status = EXIT_STATUS
    trainer.accelerator.end_training()
    return status
