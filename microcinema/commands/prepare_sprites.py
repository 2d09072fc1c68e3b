"""The command `prepare sprites`: renders Moving Sprites to disk."""

from pathlib import Path

from microcinema.config.schema import PrepareSprites
from microcinema.sprites.dataset import TRUTH_FILE, write_dataset
from microcinema.utils.errors import UserError
from microcinema.utils.files import LOCK


def run(config: PrepareSprites) -> None:
    """Renders the data set and prints where it is; a UserError if the folder holds something else."""
    folder = Path(config.output_dir)
    if not (folder / TRUTH_FILE).is_file() and any(path.name != LOCK for path in folder.glob("*")):
        raise UserError(f"output_dir '{folder}' holds something other than Moving Sprites; choose a new folder")
    shape = config.num_frames, config.size, config.fps
    write_dataset(folder, config.num_videos, config.seed, config.split, *shape, rotation_weight=config.rotation_weight)
    print(f"{config.num_videos} clips in {folder}")
