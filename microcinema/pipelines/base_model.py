"""The text-to-image model that a video model is built on: where it is, whether it is whole and of the right kind."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from microcinema.diffusion.schedule import make_scheduler
from microcinema.models.unet2d import check_keys, load_checked, unet2d_arguments
from microcinema.models.vae import vae_scale_factor
from microcinema.pipelines.loading import fetch
from microcinema.utils.errors import UserError, first_line

ASSETS = Path(__file__).parents[1] / "assets"
INDEX = "model_index.json"
# What a video model takes from its base as it is.
BASE_COMPONENTS: dict[str, Any] = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
# Older files name position_ids, which is a constant and no longer a weight.
_CONSTANTS = ("position_ids",)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Base:
    """A Stable Diffusion's parts; networks are frozen and in evaluation mode, the scheduler is for training."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position, in each direction."""
        return vae_scale_factor(self.vae)


def load_base(
    pretrained_model_name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    weights: bool = True,
) -> Base:
    """Opens a Stable Diffusion in the diffusers layout. Prediction type and noise schedule are what its own files say.

    Args:
        pretrained_model_name_or_path: the name of an embedded model, a folder, or a hub repository (`owner/name`).
        revision, variant: of a hub repository; which weight files, such as `fp16`.
        prediction_type: what its files are expected to say; None: whatever they say.
        torch_dtype: of the weights in memory, whatever they are stored in.
        weights: read them; False: the networks as their settings describe them, newly initialised in torch's default type.

    Raises:
        UserError: there is no such model, a component is missing, of another kind, damaged, or does not fit another one.
    """
    name = os.fspath(pretrained_model_name_or_path)
    folder = resolve_snapshot(name, (), revision, variant)
    _check_kind(name, folder)  # from its settings, before gigabytes are fetched and read
    scheduler = make_scheduler(load_scheduler_config(folder))
    said = scheduler.config["prediction_type"]
    if prediction_type not in (None, said):
        raise UserError(
            f"base.prediction_type is {prediction_type}, but the scheduler file of '{name}' says {said}, which wins; "
            "set base.prediction_type=null, or name another base"
        )
    unet = {"unet": UNet2DConditionModel}
    if weights:
        folder = resolve_snapshot(name, [*BASE_COMPONENTS, *unet], revision, variant)
    components = load_components(folder, BASE_COMPONENTS | unet, variant, torch_dtype, weights)
    base = Base(scheduler=scheduler, **components)
    check_compatible(name, base.vae, base.text_encoder, base.unet)
    return base


def borrow(
    base: str | None, revision: str | None = None, variant: str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The VAE, text encoder and tokenizer of a video model's base, for a pipeline that was saved without them.

    Raises:
        UserError: the pipeline names no base, or that cannot be opened.
    """
    if base is None:
        raise UserError(
            f"a video pipeline has neither its own {', '.join(BASE_COMPONENTS)} nor a base to take them from; name a base"
        )
    return load_components(resolve_snapshot(base, BASE_COMPONENTS, revision, variant), BASE_COMPONENTS, variant, dtype)


def check_compatible(source: str, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: Any) -> None:
    """Refuses parts that cannot work together.

    Raises:
        UserError: the UNet reads embeddings of another width or latents of other channels.
    """
    width, wanted = text_encoder.config.hidden_size, unet.config["cross_attention_dim"]
    if width != wanted:
        raise UserError(
            f"'{source}': the text encoder is {width} wide, its UNet reads {wanted}; use files of one model"
        )
    channels, wanted = vae.config["latent_channels"], unet.config["in_channels"]
    if channels != wanted:
        raise UserError(f"'{source}': the VAE has {channels} channels, its UNet reads {wanted}; use files of one model")


def check_weights(folder: str, variant: str | None = None) -> None:
    """Looks, without reading them, for the weights of a base.

    Raises:
        UserError: a network has none, or they are pickles or of another variant.
    """
    for name, kind in {**BASE_COMPONENTS, "unet": UNet2DConditionModel}.items():
        if not issubclass(kind, CLIPTokenizer):
            _check_weight_files(Path(folder, name), kind, variant)


def _check_kind(name: str, folder: str) -> None:
    """Refuses, by its settings alone, a model that no video model can be built on."""
    index = load_index(folder)
    cannot = f"'{name}' is a {index.get('_class_name')} and cannot be the base of a video model"
    advice = "use a Stable Diffusion 1.x or 2.x as base, and this one for key frames alone"
    if (index.get("unet") or [None])[0] is None:
        found = (index.get("transformer") or index.get("prior") or [None, None])[1]
        raise UserError(f"{cannot}: {f'its denoiser is a {found}' if found else 'it has no unet'}; {advice}")
    try:
        config = dict(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the unet's config of '{name}' ({first_line(error)})") from None
    try:
        unet2d_arguments(config)
    except UserError as error:
        raise UserError(f"{cannot}: {error}") from None
    reads, predicts = config.get("in_channels", 4), config.get("out_channels", 4)
    if reads != predicts:
        raise UserError(
            f"{cannot}: its UNet reads {reads} channels for the {predicts} that it predicts (inpainting or the like); {advice}"
        )


def locate(name: str | os.PathLike[str]) -> str:
    """The folder of a local or embedded model; a hub repository's name is returned as it is.

    Raises:
        UserError: it is none of the three.
    """
    text = os.fspath(name)
    if Path(text).is_dir():
        return text
    if is_embedded(text):
        return str(ASSETS / text)
    if text.endswith((".safetensors", *_PICKLES)):
        raise UserError(
            f"model '{text}' is a single file; make a diffusers folder of it once, by "
            f"StableDiffusionPipeline.from_single_file('{text}').save_pretrained(folder), and give that"
        )
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    embedded = sorted(index.parent.name for index in ASSETS.glob(f"*/{INDEX}"))
    there = f"the embedded models are {', '.join(embedded)}" if embedded else "no model is embedded"
    raise UserError(f"model '{text}' is neither a folder nor an embedded model ({there}) nor an owner/name of the hub")


def is_embedded(name: str | os.PathLike[str]) -> bool:
    """Whether `locate` finds the model among the embedded ones."""
    return not Path(name).is_dir() and (ASSETS / name).is_dir() and Path(name).name == os.fspath(name)


def resolve_snapshot(
    name: str | os.PathLike[str],
    components: Iterable[str] = (),
    revision: str | None = None,
    variant: str | None = None,
) -> str:
    """The folder of a local or embedded model, or that of a hub repository in the cache, with these components' weights.

    Raises:
        UserError: there is no such model, or a revision is asked of a folder.
    """
    source = locate(name)
    if not Path(source).is_dir():
        return fetch(source, components, revision, variant)
    if revision is not None:
        raise UserError(f"'{name}' is a folder here and has no revision '{revision}'; set revision=null")
    return source


def load_index(source: str, revision: str | None = None) -> dict[str, Any]:
    """What `model_index.json` says of a pipeline folder or hub repository.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    folder = resolve_snapshot(source, revision=revision)
    try:
        return dict(DiffusionPipeline.load_config(folder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read '{folder}/{INDEX}' ({first_line(error)}); give a saved diffusers pipeline"
        ) from None


def load_components(
    folder: str,
    classes: Mapping[str, Any],
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
) -> dict[str, Any]:
    """Opens components of a saved pipeline; networks are frozen, in evaluation mode and of the given type.

    Args:
        folder: of the pipeline.
        classes: name to class: diffusers or transformers networks, or a tokenizer.
        weights: as in `load_base`.

    Raises:
        UserError: a component is missing or of another class, or its weights are not exactly the network's.
    """
    index = load_index(folder)
    loaded = {}
    for name, kind in classes.items():
        _, found = index.get(name) or (None, None)
        if found is None:
            raise UserError(f"'{folder}' has no {name}; a model of this kind needs {', '.join(classes)}")
        if found.removesuffix("Fast") != kind.__name__.removesuffix("Fast"):
            raise UserError(
                f"'{folder}' has a {found} as {name}, which is not supported; it has to be a {kind.__name__}"
            )
        loaded[name] = load_component(Path(folder, name), kind, variant, dtype, weights)
    return loaded


def load_scheduler_config(folder: str) -> dict[str, Any]:
    """The settings in a saved pipeline's scheduler file.

    Raises:
        UserError: there is none.
    """
    try:
        return dict(DDPMScheduler.load_config(folder, subfolder="scheduler"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the scheduler of '{folder}' ({first_line(error)})") from None


def encode_text(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: list[str], device: torch.device | None = None
) -> torch.Tensor:
    """Embeddings (b, n, d) of texts, padded or cut to the tokenizer's length n, as Stable Diffusion reads them.

    Args:
        device: that the encoder runs on; None: where it is. With offloading that is elsewhere until it is called.
    """
    tokens = tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return text_encoder(tokens.input_ids.to(device or text_encoder.device))[0]


def freeze(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The network in evaluation mode, without gradients, with weights of this type, whatever they are stored in."""
    # Not by an argument of from_pretrained, whose name changes from one release of these libraries to the next, and not by
    # diffusers' own `to`, which warns of layers that must stay float32 even where there are none.
    return torch.nn.Module.to(network, dtype).eval().requires_grad_(False)


def load_component(
    path: Path,
    kind: Any,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
    others: tuple[str, ...] = (),
) -> Any:
    """Opens one component; a network is frozen, in evaluation mode and of the given type.

    Args:
        path: its folder.
        kind: class of a network of diffusers or transformers, or of a tokenizer.
        weights: as in `load_base`.
        others: how keys of weights begin that may be there and are not read.

    Raises:
        UserError: it cannot be opened, or its weights are not exactly the network's.
    """
    name, source = path.name, path.parent
    try:
        if issubclass(kind, PreTrainedTokenizerBase):
            return kind.from_pretrained(path)
        if not weights:
            of_transformers = issubclass(kind, PreTrainedModel)
            network = (
                kind(kind.config_class.from_pretrained(path))
                if of_transformers
                else kind.from_config(kind.load_config(path))
            )
            return network.eval().requires_grad_(False)
        _check_weight_files(path, kind, variant)
        if kind.__module__.startswith("transformers."):
            network, info = kind.from_pretrained(path, output_loading_info=True, variant=variant, use_safetensors=True)
            extra = [key for key in info["unexpected_keys"] if not (key.endswith(_CONSTANTS) or key.startswith(others))]
            check_keys(info["missing_keys"], extra, f"'{path}'")
        else:
            network = load_checked(kind.from_pretrained, path, variant=variant, use_safetensors=True)
    except UserError:
        raise
    except Exception as error:  # each library has its own for files that are missing, damaged or of another shape
        raise UserError(
            f"cannot load the {name} of '{source}' ({first_line(error)}); give a complete model of safetensors"
        ) from error
    return freeze(network, dtype)


def refuse_pickles(path: Path) -> None:
    """Refuses a component's folder that has weights, and none of them as safetensors.

    Raises:
        UserError: how to convert them is said.
    """
    pickles = sorted(file.name for file in path.glob("*") if file.suffix in _PICKLES)
    if pickles and not any(path.glob("*.safetensors")):
        whole = path.parent
        raise UserError(
            f"'{path}' has its weights as a pickle ({pickles[0]}), which can run any code when it is read, and not as safetensors; "
            'if you trust it, convert it: python -c "from diffusers import DiffusionPipeline as P; '
            f"P.from_pretrained('{whole}').save_pretrained('{whole}-safetensors')\""
        )


def _check_weight_files(path: Path, kind: Any, variant: str | None) -> None:
    """Tells what the libraries' messages leave to guess: no weights, weights that are pickles, weights of another variant."""
    refuse_pickles(path)
    weights = sorted(file.name for file in path.glob("*.safetensors"))
    # A condition encoder without networks has none, and checks itself.
    if not weights and not kind.__module__.startswith("microcinema."):
        raise UserError(f"'{path}' holds no weights, no .safetensors file; complete the model's folder")
    # model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
    variants = {match[1] for name in weights if (match := re.match(r"[^.]*\.(?:([^.]*?)(?:-\d+-of-\d+)?\.)?", name))}
    if weights and variant not in variants:
        there = " and ".join(sorted(f"variant={name or 'null'}" for name in variants))
        raise UserError(f"'{path}' has no weights of variant={variant or 'null'}; it has {there}")
