"""Saved video pipelines: writing them, opening them, and keeping one beside its base without storing the base's parts twice."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection, T5EncoderModel, T5TokenizerFast

from microcinema.diffusion.schedule import make_sampler
from microcinema.models.conditioning import ConditionEncoder
from microcinema.models.video_unet import VideoUNet
from microcinema.models.weights import check_keys
from microcinema.pipelines.base_model import BASE_COMPONENTS
from microcinema.pipelines.encoders import IMAGE_ENCODER, MOTION_ENCODER, MOTION_TOKENIZER
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.pipelines.loading import (
    INDEX,
    freeze,
    is_embedded,
    load_components,
    load_index,
    load_scheduler_config,
    resolve_model_path,
    resolve_snapshot,
)
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_folder

_TRAINED = {"unet": VideoUNet, "condition_encoder": ConditionEncoder}
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_READERS: dict[str, Any] = {
    IMAGE_ENCODER: CLIPVisionModelWithProjection,
    MOTION_ENCODER: T5EncoderModel,
    MOTION_TOKENIZER: T5TokenizerFast,
}


def save_pipeline(pipeline: ImageToVideoPipeline, folder: str | os.PathLike[str], with_base: bool = True) -> None:
    """Writes the pipeline as a diffusers folder, whole or not at all. Files that are already in the folder are replaced with it.

    Args:
        with_base: store all that is not trained too: VAE, text encoder and tokenizer, image and motion encoder; without them, whoever
            opens it takes them from where the pipeline has them from; and the UNet's frozen weights too, if their `unet_source` is an
            embedded model (diffusers itself cannot open such a folder, `load_pipeline` can).

    Raises:
        UserError: the folder cannot be written, or there is no base to leave the parts to.
    """
    with atomic_folder(folder) as temporary:
        write_pipeline(pipeline, temporary, with_base)


def write_pipeline(pipeline: ImageToVideoPipeline, folder: Path, with_base: bool) -> None:
    """Writes the pipeline's files into a folder, as in `save_pipeline`."""
    _write(pipeline, folder, with_base)
    for file in (folder / INDEX, *folder.glob("*/config.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        # Where a part was opened from is a path of this machine, and nothing to whoever opens the folder on another.
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write(pipeline: ImageToVideoPipeline, folder: Path, with_base: bool) -> None:
    if with_base:
        pipeline.save_pretrained(folder)
        return
    if pipeline.config["base"] is None:
        raise UserError("the pipeline names no base to take its VAE and text encoder from; save it with them")
    own = {name: pipeline.config[name] for name in (*BASE_COMPONENTS, *_READERS)}
    # How diffusers writes down a part that is not there.
    pipeline.register_to_config(**dict.fromkeys(own, (None, None)))
    try:
        pipeline.save_pretrained(folder)
    finally:
        pipeline.register_to_config(**own)
    if (source := pipeline.config["unet_source"]) is not None and is_embedded(source):
        lent = _unet_weights(source)
        weights = {
            name: value
            for name, value in pipeline.unet.state_dict().items()
            if name not in lent or not torch.equal(lent[name].to(value), value)
        }
        for file in (folder / "unet").glob("*.safetensors*"):
            file.unlink()
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / "unet" / _WEIGHTS)


def _unet_weights(embedded: str) -> dict[str, torch.Tensor]:
    """The UNet's weights of an embedded model."""
    file = Path(resolve_model_path(embedded), "unet", _WEIGHTS)
    if not file.is_file():
        raise UserError(f"'{file}', which the video model borrows, is not there; complete the model's folder")
    return load_file(file)


def borrowed_weights(folder: str, index: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The UNet's weights that a saved pipeline takes from its `unet_source`; none where its folder has all of them.

    Args:
        index: what `model_index.json` of the folder says.

    Raises:
        UserError: the source is not there.
    """
    source, light = index.get("unet_source"), not any(Path(folder, part).is_dir() for part in BASE_COMPONENTS)
    return _unet_weights(source) if light and source is not None and is_embedded(source) else {}


def _complete_unet(folder: Path, borrowed: Mapping[str, torch.Tensor], dtype: torch.dtype) -> VideoUNet:
    """A UNet whose folder holds only what is not borrowed.

    Raises:
        UserError: together they are not all of its weights.
    """
    unet = VideoUNet.from_config(VideoUNet.load_config(folder))
    wanted = unet.state_dict().keys()
    own = load_file(folder / _WEIGHTS)
    weights = {name: value for name, value in borrowed.items() if name in wanted} | own
    check_keys(wanted - weights.keys(), weights.keys() - wanted, f"'{folder}'")
    unet.load_state_dict(weights)
    return freeze(unet, dtype)  # type: ignore[return-value]


def load_pipeline(
    name: str | os.PathLike[str], scheduler: str | None = None, torch_dtype: torch.dtype = torch.float32
) -> ImageToVideoPipeline:
    """Opens a saved video pipeline.

    Args:
        name: an embedded model, a folder or a hub repository.
        scheduler: a scheduler class of diffusers for sampling; None: the saved one.
        torch_dtype: of the weights in memory, whatever they are stored in.

    Raises:
        UserError: there is no such pipeline, a component is missing, or its keys are not the network's (they are named).
    """
    folder = resolve_snapshot(name, [*_TRAINED, *BASE_COMPONENTS, *_READERS])
    index = load_index(folder)
    if index.get("_class_name") != ImageToVideoPipeline.__name__:
        raise UserError(
            f"'{folder}' holds a {index.get('_class_name')}; give a video pipeline that was saved by training"
        )
    components = {*BASE_COMPONENTS, *_READERS, *_TRAINED, "scheduler"}
    settings = {key: value for key, value in index.items() if not key.startswith("_") and key not in components}
    if borrowed := borrowed_weights(folder, index):
        trained = load_components(folder, {"condition_encoder": ConditionEncoder}, dtype=torch_dtype)
        trained["unet"] = _complete_unet(Path(folder, "unet"), borrowed, torch_dtype)
    else:
        trained = load_components(folder, _TRAINED, dtype=torch_dtype)
    whole = all((Path(folder) / part).is_dir() for part in BASE_COMPONENTS)
    lent = load_components(folder, BASE_COMPONENTS, dtype=torch_dtype) if whole else dict.fromkeys(BASE_COMPONENTS)
    there = {name: kind for name, kind in _READERS.items() if (index.get(name) or [None])[0] is not None}
    readers = load_components(folder, there, dtype=torch_dtype)
    config = load_scheduler_config(folder)
    saved = getattr(diffusers, config["_class_name"]).from_config(config)
    pipeline = ImageToVideoPipeline(
        **lent, **readers, **trained, scheduler=make_sampler(saved, scheduler) if scheduler else saved, **settings
    )
    pipeline.register_to_config(_name_or_path=str(name))
    return pipeline


def load_keyframe_pipeline(
    video: ImageToVideoPipeline | str | os.PathLike[str],
    name: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> KeyframePipeline:
    """The text-to-image pipeline `name`, or the base that the video model was trained from.

    Args:
        video: a video pipeline, or where one is saved; its weights are not read.
        the rest: as in `KeyframePipeline.from_pretrained`.

    Raises:
        UserError: neither can be opened.
    """
    if name is None:
        config = video.config if isinstance(video, ImageToVideoPipeline) else load_index(os.fspath(video))
        name, revision, variant = (config.get(key) for key in ("base", "base_revision", "base_variant"))
        if name is None:
            raise UserError("the video pipeline names no base to draw key frames with; name a text-to-image pipeline")
    return KeyframePipeline.from_pretrained(name, revision, variant, torch_dtype)
