"""The command `prepare`: Moving Sprites on disk, and their latents if a model is named."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from microcinema.data.clips import ClipDataset
from microcinema.data.latents import encode_dataset
from microcinema.data.sprites_dataset import CSV_FILE, TRUTH_FILE, write_dataset
from microcinema.errors import UserError
from microcinema.pipelines.base import load_base

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(config: "DictConfig") -> None:
    """Renders the data set that the config of `prepare` describes, encodes it if asked to, and prints where it is.

    Raises:
        UserError: the folder holds something else, which the new data set would replace, or there is no such model.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not (folder / TRUTH_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output_dir '{folder}' holds something other than Moving Sprites; choose a new folder")
    vae = load_base(config.latents_of).vae if config.latents_of else None  # before the long part, which it may refuse
    num_frames, size, fps = config.num_frames, config.size, config.fps
    write_dataset(folder, config.num_clips, config.seed, config.split, num_frames, size, fps)
    print(f"{config.num_clips} clips in {folder}")
    if vae is not None:
        dataset = ClipDataset(str(folder / CSV_FILE), str(folder), num_frames, fps, size, clip="first")
        encode_dataset(dataset, vae.to("cuda" if torch.cuda.is_available() else "cpu"), folder / "latents")
        print(f"their latents in {folder / 'latents'}")
