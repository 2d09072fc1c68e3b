"""The Stable Diffusion that a video model is built on: what is taken from it, and the checks that it is of the right kind."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from microcinema.diffusion.schedule import make_scheduler
from microcinema.models.unet2d import unet2d_arguments
from microcinema.models.vae import vae_scale_factor
from microcinema.pipelines.loading import (
    component_class,
    load_components,
    load_index,
    load_scheduler_config,
    resolve_snapshot,
    user_error_if_damaged,
)
from microcinema.utils.errors import UserError, user_errors

# What a video model takes from its base unchanged.
BASE_COMPONENTS: dict[str, Any] = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
SECOND_ENCODER: dict[str, Any] = {"text_encoder_2": CLIPTextModelWithProjection, "tokenizer_2": CLIPTokenizer}  # SDXL's
_ZEROS = "force_zeros_for_empty_prompt"


@dataclass(frozen=True)
class Base:
    """Components of a Stable Diffusion: frozen networks in evaluation mode, and the scheduler for training."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    force_zeros_for_empty_prompt: bool = False

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments of `ImageToVideoPipeline` that are the base's own."""
        return {name: getattr(self, name) for name in (*BASE_COMPONENTS, *SECOND_ENCODER, _ZEROS)}

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position, in each direction."""
        return vae_scale_factor(self.vae)


@user_error_if_damaged
def load_base(
    pretrained_model_name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    weights: bool = True,
) -> Base:
    """Opens a Stable Diffusion in the diffusers layout. Its own files decide prediction type and noise schedule.

    Args:
        pretrained_model_name_or_path: an embedded model, a folder, a hub repository (`owner/name`) or a single file.
        revision: of a hub repository: a branch, tag or commit.
        variant: of the weight files, such as `fp16`.
        prediction_type: that its files are expected to state; None: any.
        torch_dtype: of the weights in memory, whatever they are stored in.
        weights: False: networks newly initialized from their configs, in torch's default dtype.

    Raises:
        UserError: there is no such model, or a component is missing, of another kind, damaged, or does not fit another one.
    """
    name = os.fspath(pretrained_model_name_or_path)
    folder = resolve_snapshot(name, (), revision, variant)
    _check_unet_config(name, folder)  # before gigabytes are downloaded and read
    scheduler = make_scheduler(load_scheduler_config(folder))
    actual = scheduler.config["prediction_type"]
    if prediction_type not in (None, actual):
        fault = f"base.prediction_type is {prediction_type}, but '{name}' says {actual}"
        raise UserError(f"{fault}; set it to null, or name another base")
    classes, own = base_components(folder)
    classes["unet"] = UNet2DConditionModel
    if weights:
        folder = resolve_snapshot(name, classes, revision, variant)
    base = Base(scheduler=scheduler, **own, **load_components(folder, classes, variant, torch_dtype, weights, name))
    check_compatible(name, base.shared, base.unet.config)
    return base


def base_components(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The classes of what a video model takes from a base in a folder, by name, and its setting for empty texts."""
    index = load_index(folder)
    second = {name: cls for name, cls in SECOND_ENCODER.items() if component_class(index, name) is not None}
    return {**BASE_COMPONENTS, **second}, {_ZEROS: bool(second) and bool(index.get(_ZEROS, True))}


def check_compatible(source: str, components: Mapping[str, Any], unet2d: Mapping[str, Any]) -> None:
    """Refuses a 2D UNet, by its config, that expects text embeddings of another width, or latents with another number of channels."""
    encoders = [components[name] for name in ("text_encoder", "text_encoder_2") if components[name] is not None]
    widths = [
        ("text encoder's width", sum(encoder.config.hidden_size for encoder in encoders), "cross_attention_dim"),
        ("VAE's number of latent channels", components["vae"].config["latent_channels"], "in_channels"),
    ]
    if unet2d.get("addition_embed_type"):
        if len(encoders) < 2:
            raise UserError(f"'{source}': its UNet reads two text encoders, and there is no text_encoder_2; add it")
        sizes = 6 * unet2d["addition_time_embed_dim"]  # of original, crop and target
        widths.append(
            ("pooled text", encoders[1].config.projection_dim + sizes, "projection_class_embeddings_input_dim")
        )
    for component, width, argument in widths:
        if width != (expected := unet2d[argument]):
            fault = f"the {component} is {width}, but its UNet has {argument}={expected}"
            raise UserError(f"'{source}': {fault}; use files of one model")


def _check_unet_config(name: str, folder: str) -> None:
    """Refuses, by its configs alone, a model that no video model can be built on."""
    index = load_index(folder)
    prefix = f"'{name}' is a {index.get('_class_name')} and cannot be the base of a video model"
    advice = "use a Stable Diffusion 1.x, 2.x or XL as base, and this one for key frames alone"
    if component_class(index, "unet") is None:
        denoiser = component_class(index, "transformer") or component_class(index, "prior")
        raise UserError(f"{prefix}: {f'its denoiser is a {denoiser}' if denoiser else 'it has no unet'}; {advice}")
    with user_errors(f"cannot read the unet's config of '{name}' ({{reason}})"):
        config = dict(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    try:
        unet2d_arguments(config)
    except UserError as error:
        raise UserError(f"{prefix}: {error}") from None
    inputs, outputs = config.get("in_channels", 4), config.get("out_channels", 4)
    if inputs != outputs:
        raise UserError(f"{prefix}: its UNet has {inputs} input and {outputs} output channels; {advice}")
