"""The text-to-image model that a video model is built on: where it is, whether it is whole and of the right kind."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from microcinema.diffusion.schedule import make_scheduler
from microcinema.errors import UserError
from microcinema.models.unet2d import check_keys, load_checked

ASSETS = Path(__file__).parents[1] / "assets"
INDEX = "model_index.json"
_CLASSES: dict[str, Any] = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "unet": UNet2DConditionModel,
}
# Older files name position_ids, which is a constant and no longer a weight.
_CONSTANTS = ("position_ids",)


@dataclass(frozen=True)
class Base:
    """A Stable Diffusion's parts; networks are frozen and in evaluation mode, the scheduler is for training."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler


def load_base(
    pretrained_model_name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> Base:
    """Opens a Stable Diffusion in the diffusers layout. Prediction type and noise schedule are what its own files say.

    Args:
        pretrained_model_name_or_path: the name of an embedded model, a folder, or a hub repository (`owner/name`).
        revision, variant: of a hub repository; which weight files, such as `fp16`.
        torch_dtype: of the weights in memory, whatever they are stored in.

    Raises:
        UserError: there is no such model, a component is missing, of another kind, damaged, or does not fit another one.
    """
    source = locate(pretrained_model_name_or_path)
    components = load_components(source, _CLASSES, revision, variant, torch_dtype)
    base = Base(scheduler=make_scheduler(load_scheduler_config(source, revision)), **components)
    width, wanted = base.text_encoder.config.hidden_size, base.unet.config["cross_attention_dim"]
    if width != wanted:
        raise UserError(
            f"'{source}': the text encoder is {width} wide, its UNet reads {wanted}; use files of one model"
        )
    channels, wanted = base.vae.config["latent_channels"], base.unet.config["in_channels"]
    if channels != wanted:
        raise UserError(f"'{source}': the VAE has {channels} channels, its UNet reads {wanted}; use files of one model")
    return base


def locate(name: str | os.PathLike[str]) -> str:
    """The folder of a local or embedded model; a hub repository's name is returned as it is.

    Raises:
        UserError: it is none of the three.
    """
    text = os.fspath(name)
    if Path(text).is_dir():
        return text
    if (ASSETS / text / INDEX).is_file():
        return str(ASSETS / text)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    embedded = sorted(index.parent.name for index in ASSETS.glob(f"*/{INDEX}"))
    there = f"the embedded models are {', '.join(embedded)}" if embedded else "no model is embedded"
    raise UserError(f"model '{text}' is neither a folder nor an embedded model ({there}) nor an owner/name of the hub")


def load_index(source: str, revision: str | None = None) -> dict[str, Any]:
    """What `model_index.json` says of a pipeline folder or hub repository.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return dict(DiffusionPipeline.load_config(source, revision=revision))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read '{source}/{INDEX}' ({_first_line(error)}); give a saved diffusers pipeline"
        ) from None


def load_components(
    source: str,
    classes: Mapping[str, Any],
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Opens components of a saved pipeline; networks are frozen, in evaluation mode and of the given type.

    Args:
        classes: name to class: diffusers or transformers networks, or a tokenizer.

    Raises:
        UserError: a component is missing or of another class, or its weights are not exactly the network's.
    """
    index = load_index(source, revision)
    loaded = {}
    for name, kind in classes.items():
        _, found = index.get(name) or (None, None)
        if found is None:
            raise UserError(f"'{source}' has no {name}; a model of this kind needs {', '.join(classes)}")
        if found.removesuffix("Fast") != kind.__name__:
            raise UserError(
                f"'{source}' has a {found} as {name}, which is not supported; it has to be a {kind.__name__}"
            )
        loaded[name] = _load(source, name, kind, revision, variant, dtype)
    return loaded


def load_scheduler_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """The settings in a saved pipeline's scheduler file.

    Raises:
        UserError: there is none.
    """
    try:
        return dict(DDPMScheduler.load_config(source, subfolder="scheduler", revision=revision))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the scheduler of '{source}' ({_first_line(error)})") from None


def encode_text(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: list[str]) -> torch.Tensor:
    """Embeddings (b, n, d) of texts, padded or cut to the tokenizer's length n, as Stable Diffusion reads them."""
    tokens = tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]


def freeze(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The network in evaluation mode, without gradients, with weights of this type, whatever they are stored in."""
    # Not by an argument of from_pretrained, whose name changes from one release of these libraries to the next, and not by
    # diffusers' own `to`, which warns of layers that must stay float32 even where there are none.
    return torch.nn.Module.to(network, dtype).eval().requires_grad_(False)


def _load(source: str, name: str, kind: Any, revision: str | None, variant: str | None, dtype: torch.dtype) -> Any:
    # The component's own folder where there is one, so that messages of the libraries name it.
    where: dict[str, Any]
    path, where = (os.path.join(source, name), {}) if Path(source).is_dir() else (source, {"subfolder": name})
    where = {**where, "revision": revision}
    try:
        if issubclass(kind, CLIPTokenizer):
            return kind.from_pretrained(path, **where)
        where = {**where, "variant": variant, "use_safetensors": True}
        if kind.__module__.startswith("transformers."):
            network, info = kind.from_pretrained(path, output_loading_info=True, **where)
            extra = [key for key in info["unexpected_keys"] if not key.endswith(_CONSTANTS)]
            check_keys(info["missing_keys"], extra, f"'{path}'")
        else:
            network = load_checked(kind.from_pretrained, path, **where)
    except UserError:
        raise
    except Exception as error:  # each library has its own for files that are missing, damaged or of another shape
        raise UserError(
            f"cannot load the {name} of '{source}' ({_first_line(error)}); give a complete model of safetensors"
        ) from error
    return freeze(network, dtype)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
