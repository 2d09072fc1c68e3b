"""Writing and opening video pipelines, whole or *light*: without what they share with their base.

A light folder has no VAE, text encoders, tokenizers, image or motion encoder, and if `unet_source` is an embedded model, only those
weights of the UNet that differ from it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection, T5EncoderModel, T5TokenizerFast

from microcinema.models.video_unet import VideoUNet
from microcinema.models.weights import check_keys
from microcinema.pipelines.base_model import BASE_COMPONENTS, SECOND_ENCODER
from microcinema.pipelines.encoders import IMAGE_ENCODER, MOTION_ENCODER, MOTION_TOKENIZER
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.pipelines.loading import (
    INDEX,
    component_class,
    freeze,
    is_embedded,
    load_components,
    load_index,
    load_scheduler_config,
    resolve_model_path,
    resolve_snapshot,
    user_error_if_damaged,
    weight_variants,
)
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_folder

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_ENCODERS: dict[str, Any] = {
    **SECOND_ENCODER,
    IMAGE_ENCODER: CLIPVisionModelWithProjection,
    MOTION_ENCODER: T5EncoderModel,
    MOTION_TOKENIZER: T5TokenizerFast,
}


def save_pipeline(pipeline: ImageToVideoPipeline, folder: str | os.PathLike[str], with_base: bool = True) -> None:
    """Writes a pipeline as a diffusers folder, atomically. An existing folder is replaced.

    Args:
        with_base: store the frozen components too; False: a light folder, which `load_pipeline` opens and diffusers itself does not.

    Raises:
        UserError: the folder cannot be written, or a light pipeline names no base.
    """
    with atomic_folder(folder) as temporary:
        write_pipeline(pipeline, temporary, with_base)


def write_pipeline(pipeline: ImageToVideoPipeline, folder: Path, with_base: bool) -> None:
    """Writes a pipeline's files into an existing folder, as `save_pipeline` does."""
    if with_base:
        pipeline.save_pretrained(folder)
    else:
        _write_light(pipeline, folder)
    for file in (folder / INDEX, *folder.glob("*/config.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:  # it means nothing on another machine
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_light(pipeline: ImageToVideoPipeline, folder: Path) -> None:
    if pipeline.config["base"] is None:
        raise UserError("the pipeline names no base to take its VAE and text encoder from; save it with them")
    frozen = {name: pipeline.config[name] for name in (*BASE_COMPONENTS, *_ENCODERS)}
    pipeline.register_to_config(**dict.fromkeys(frozen, (None, None)))  # how diffusers notes a missing component
    try:
        pipeline.save_pretrained(folder)
    finally:
        pipeline.register_to_config(**frozen)
    if (source := pipeline.config["unet_source"]) is not None and is_embedded(source):
        shared = _embedded_unet_weights(source)
        weights = {
            name: value.contiguous()
            for name, value in pipeline.unet.state_dict().items()
            if name not in shared or not torch.equal(shared[name].to(value), value)
        }
        for file in (folder / "unet").glob("*.safetensors*"):
            file.unlink()
        save_file(weights, folder / "unet" / _WEIGHTS)


def _embedded_unet_weights(name: str) -> dict[str, torch.Tensor]:
    file = Path(resolve_model_path(name), "unet", _WEIGHTS)
    if not file.is_file():
        raise UserError(f"the UNet's weights '{file}' are missing; complete the embedded model's folder")
    return load_file(file)


def load_source_weights(folder: str, index: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The UNet weights that a light folder, of this index, takes from its `unet_source`; empty if it has all weights."""
    source, is_light = index.get("unet_source"), not any(Path(folder, name).is_dir() for name in BASE_COMPONENTS)
    return _embedded_unet_weights(source) if is_light and source is not None and is_embedded(source) else {}


def _complete_unet(folder: Path, source: Mapping[str, torch.Tensor], dtype: torch.dtype) -> VideoUNet:
    """The UNet of a light folder, completed by the weights of its source."""
    unet = VideoUNet.from_config(VideoUNet.load_config(folder))
    expected, stored = unet.state_dict().keys(), load_file(folder / _WEIGHTS)
    weights = {name: value for name, value in source.items() if name in expected} | stored
    check_keys(expected - weights.keys(), weights.keys() - expected, f"'{folder}'")
    unet.load_state_dict(weights)
    return freeze(unet, dtype)  # type: ignore[return-value]


@user_error_if_damaged
def load_pipeline(
    name: str | os.PathLike[str],
    torch_dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> ImageToVideoPipeline:
    """Opens a saved video pipeline.

    Args:
        name: an embedded model, a folder or a hub repository.
        torch_dtype: of the weights in memory, whatever they are stored in.
        variant: of the weight files, such as `fp16`; None: that of the folder's UNet, if it has only one.

    Raises:
        UserError: there is no such pipeline, a component is missing, or its keys are not the network's.
    """
    folder = resolve_snapshot(name, ["unet", *BASE_COMPONENTS, *_ENCODERS], variant=variant)
    index = load_index(folder)
    if index.get("_class_name") != ImageToVideoPipeline.__name__:
        raise UserError(f"'{folder}' holds a {index.get('_class_name')}; give a video pipeline saved by training")
    source = load_source_weights(folder, index)
    classes: dict[str, Any] = {} if source else {"unet": VideoUNet}
    if all(Path(folder, key).is_dir() for key in BASE_COMPONENTS):
        classes |= BASE_COMPONENTS
    classes |= {key: cls for key, cls in _ENCODERS.items() if component_class(index, key) is not None}
    components: dict[str, Any] = dict.fromkeys(BASE_COMPONENTS)
    if variant is None and len(variants := weight_variants(Path(folder, "unet"))) == 1:
        (variant,) = variants
    components |= load_components(folder, classes, variant, torch_dtype)
    if source:
        components["unet"] = _complete_unet(Path(folder, "unet"), source, torch_dtype)
    config = load_scheduler_config(folder)
    sampler = getattr(diffusers, config["_class_name"]).from_config(config)
    others = {*BASE_COMPONENTS, *_ENCODERS, "unet", "scheduler"}
    settings = {key: value for key, value in index.items() if not key.startswith("_") and key not in others}
    pipeline = ImageToVideoPipeline(**components, scheduler=sampler, **settings)
    pipeline.register_to_config(_name_or_path=str(name))
    return pipeline


def load_keyframe_pipeline(
    video: ImageToVideoPipeline | str | os.PathLike[str],
    name: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> KeyframePipeline:
    """The text-to-image pipeline `name`, as by `KeyframePipeline.from_pretrained`, or the base of a video model.

    Args:
        video: a video pipeline, or the name of a saved one, of which only the index is read.

    Raises:
        UserError: no name is given and the video pipeline has no base, or it cannot be opened.
    """
    if name is None:
        config = video.config if isinstance(video, ImageToVideoPipeline) else load_index(os.fspath(video))
        name, revision, variant = (config.get(key) for key in ("base", "base_revision", "base_variant"))
        if name is None:
            raise UserError("the video pipeline names no base to draw key frames with; name a text-to-image pipeline")
    return KeyframePipeline.from_pretrained(name, revision, variant, torch_dtype)
