"""Saved video pipelines: writing them, opening them, and keeping one beside its base without storing the base's parts twice."""

import os
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from microcinema.diffusion.schedule import make_sampler
from microcinema.errors import UserError
from microcinema.files import atomic_folder
from microcinema.models.conditioning import ConditionEncoder
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.base import INDEX, load_components, load_index, load_scheduler_config, locate
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import KeyframePipeline

_TRAINED = {"unet": VideoUNet, "condition_encoder": ConditionEncoder}
_BASES = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}


def save_pipeline(pipeline: ImageToVideoPipeline, folder: str | os.PathLike[str], with_base: bool = True) -> None:
    """Writes the pipeline as a diffusers folder, whole or not at all. Files that are already in the folder are replaced with it.

    Args:
        with_base: store VAE, text encoder and tokenizer too; without them, `load_pipeline` takes them from the pipeline's `base`.

    Raises:
        UserError: the folder cannot be written, or there is no base to leave the parts to.
    """
    if not with_base and pipeline.config["base"] is None:
        raise UserError("the pipeline names no base to take its VAE and text encoder from; save it with them")
    with atomic_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        for name in () if with_base else _BASES:
            shutil.rmtree(temporary / name)


def load_pipeline(
    name: str | os.PathLike[str], scheduler: str | None = None, torch_dtype: torch.dtype = torch.float32
) -> ImageToVideoPipeline:
    """Opens a saved video pipeline.

    Args:
        name: an embedded model or a folder.
        scheduler: a scheduler class of diffusers for sampling; None: the saved one.
        torch_dtype: of the weights in memory, whatever they are stored in.

    Raises:
        UserError: there is no such pipeline, a component is missing, or its keys are not the network's (they are named).
    """
    folder = locate(name)
    index = load_index(folder)
    if index.get("_class_name") != ImageToVideoPipeline.__name__:
        raise UserError(
            f"'{folder}' holds a {index.get('_class_name')}; give a video pipeline that was saved by training"
        )
    settings = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
    trained = load_components(folder, _TRAINED, dtype=torch_dtype)
    if all((Path(folder) / part).is_dir() for part in _BASES):
        borrowed = load_components(folder, _BASES, dtype=torch_dtype)
    else:
        borrowed = load_components(locate(_base_of(folder, settings)), _BASES, dtype=torch_dtype)
    config = load_scheduler_config(folder)
    saved = getattr(diffusers, config["_class_name"]).from_config(config)
    pipeline = ImageToVideoPipeline(
        **borrowed, **trained, scheduler=make_sampler(saved, scheduler) if scheduler else saved, **settings
    )
    pipeline.register_to_config(_name_or_path=str(name))
    return pipeline


def load_keyframe_pipeline(video: ImageToVideoPipeline, name: str | os.PathLike[str] | None = None) -> KeyframePipeline:
    """The text-to-image pipeline `name`, or the base that the video model was trained from.

    Raises:
        UserError: neither can be opened.
    """
    return KeyframePipeline.from_pretrained(name or _base_of("the video pipeline", dict(video.config)))


def _base_of(source: str, settings: dict[str, object]) -> str:
    base = settings.get("base")
    if not isinstance(base, str):
        raise UserError(f"{source} has neither its own {', '.join(_BASES)} nor a base in its {INDEX}; name a base")
    return base
