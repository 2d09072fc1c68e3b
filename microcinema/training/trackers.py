"""How a run stands in its tracker: its name, group and tags, everything that it was started with, and the same run after a restart."""

import uuid
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from microcinema.config.instantiate import Component
from microcinema.config.schema import Train
from microcinema.utils.files import atomic_path

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
    found: dict[str, int | float | str | bool] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, Component):
            value = {"_target_": value.target, **value.arguments}
        elif is_dataclass(value):
            value = {field.name: getattr(value, field.name) for field in fields(value)}
        if isinstance(value, Mapping):
            for name, part in value.items():
                add(f"{key}.{name}" if key else name, part)
        else:
            found[key] = value if isinstance(value, int | float | str | bool) else str(value)

    add("", config)
    return found
