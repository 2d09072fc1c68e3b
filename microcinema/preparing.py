"""The command `prepare`: Moving Sprites on disk, and if a model is named their latents, with what else models learn from."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from microcinema.data.clips import ClipDataset
from microcinema.data.flow import estimate
from microcinema.data.latents import encode_dataset
from microcinema.data.reference import reference_index
from microcinema.data.sprites_dataset import CSV_FILE, TRUTH_FILE, write_dataset
from microcinema.errors import UserError
from microcinema.pipelines.base import load_base

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(config: "DictConfig") -> None:
    """Renders the data set that the config of `prepare` describes, encodes it if asked to, and prints where it is.

    Raises:
        UserError: the folder holds something else, which the new data set would replace, there is no such model, frame or
            flow teacher, or something is to be kept beside latents that nobody asked for.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not (folder / TRUTH_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output_dir '{folder}' holds something other than Moving Sprites; choose a new folder")
    extras = {"keyframe": config.keyframe, "flow_teacher": config.flow_teacher}
    asked = [f"{name}={value}" for name, value in extras.items() if value is not None]
    if asked and config.latents_of is None:
        raise UserError(f"{', '.join(asked)} is kept beside latents only; set latents_of as well, such as sprites-base")
    num_frames, size, fps = config.num_frames, config.size, config.fps
    # Before the long part, which each of these may refuse.
    vae = load_base(config.latents_of).vae if config.latents_of else None
    if config.keyframe is not None:
        reference_index(config.keyframe, num_frames)
    if config.flow_teacher not in (None, "ground_truth"):
        estimate(config.flow_teacher, np.zeros((1, size, size, 3), np.uint8))
    write_dataset(folder, config.num_clips, config.seed, config.split, num_frames, size, fps)
    print(f"{config.num_clips} clips in {folder}")
    if vae is not None:
        dataset = ClipDataset(str(folder / CSV_FILE), str(folder), num_frames, fps, size, clip="first")
        encode_dataset(dataset, vae.to("cuda" if torch.cuda.is_available() else "cpu"), folder / "latents", **extras)
        print(f"their latents in {folder / 'latents'}")
