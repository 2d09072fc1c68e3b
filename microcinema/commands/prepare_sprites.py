"""The command `prepare sprites`: renders Moving Sprites to disk."""

import re
from pathlib import Path

from microcinema.config.schema import PrepareSprites
from microcinema.sprites.dataset import OWN_FILES, write_dataset
from microcinema.utils.errors import UserError
from microcinema.utils.files import LOCK


def run(config: PrepareSprites) -> None:
    """Renders the data set, in the place of an earlier one, and prints where it is; a UserError if the folder holds something else."""
    folder = Path(config.output_dir)
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not (path.is_dir() or name == LOCK or re.fullmatch(OWN_FILES, name)):
            advice = "choose a new folder, or move it elsewhere"
            raise UserError(f"output_dir '{folder}' holds '{name}', which is not of Moving Sprites; {advice}")
    shape = config.num_frames, config.size, config.fps
    write_dataset(folder, config.num_videos, config.seed, config.split, *shape, rotation_weight=config.rotation_weight)
    print(f"{config.num_videos} clips in {folder}")
