"""The command `train`: trains the video model that the config describes."""

import os
from collections.abc import Callable

from microcinema.config.schema import Train
from microcinema.training.build import build_trainer
from microcinema.training.preemption import EXIT_STATUS, Preempted
from microcinema.utils.errors import user_errors


def run(config: Train, on_metrics: Callable[[dict[str, float]], None] | None = None) -> int:
    """Builds accelerator, networks, data and trainer, and trains; by every process of a distributed run.

    Returns:
        The exit status: 0, or `EXIT_STATUS` after a preemption, to be continued with resume_from_checkpoint=latest.

    Raises:
        UserError: the config describes something that cannot be built or trained.
    """
    if config.report_to == "wandb" and os.environ.get("RANK", "0") == "0":
        import wandb

        # Before networks and data are loaded; WANDB_MODE=offline needs no login.
        with user_errors("report_to=wandb: {reason}; run `wandb login`, or set WANDB_MODE=offline, or another tracker"):
            wandb.login()
    trainer, status = build_trainer(config, on_metrics), 0
    try:
        trainer.train()
    except Preempted as error:
        trainer.accelerator.print(f"{error}; continue with resume_from_checkpoint=latest")
        status = EXIT_STATUS
    trainer.accelerator.end_training()
    return status
