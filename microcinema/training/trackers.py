"""How a run stands in its tracker: its name, group and tags, everything that it was started with, and the same run after a restart."""

import uuid
from pathlib import Path

from accelerate import Accelerator

from microcinema.config.compose import plain
from microcinema.config.schema import Train
from microcinema.utils.files import atomic_path
from microcinema.utils.fingerprint import flatten

RUN_ID_FILE = "wandb_run_id.txt"


def start_trackers(accelerator: Accelerator, config: Train, resumed: bool) -> None:
    """Opens the run's tracker, if it has one, with files in its folder. A resumed run goes on in its run of wandb. Collective."""
    if not config.report_to:
        return
    tracker, folder = config.tracker, Path(config.output_dir)
    run_id = folder / RUN_ID_FILE
    if accelerator.is_main_process and config.report_to == "wandb" and not (resumed and run_id.exists()):
        with atomic_path(run_id) as temporary:
            temporary.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    accelerator.wait_for_everyone()
    wandb = {
        "name": tracker.name or folder.resolve().name,
        "group": tracker.group,
        "tags": tracker.tags,
        "dir": config.output_dir,
        "id": run_id.read_text(encoding="utf-8") if run_id.exists() else None,
        "resume": "allow",
    }
    init = {"wandb": wandb} if config.report_to == "wandb" else {}
    accelerator.init_trackers(tracker.project, hyperparameters(config), init)


def hyperparameters(config: Train) -> dict[str, int | float | str | bool]:
    """Every value of a config by its key, such as `model.temporal.text`; a list and null as text, since TensorBoard knows numbers and texts."""
    values = flatten(plain(config))
    return {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in values.items()}
