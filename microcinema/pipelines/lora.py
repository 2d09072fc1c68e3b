"""LoRA files (arXiv 2106.09685) in both stages, of kohya, diffusers or peft, whose names diffusers' own conversion maps to the UNet's.

Of the video UNet only the main branch takes one, see `models.lora`; text encoder and stage 1 take theirs as in diffusers.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download
from safetensors import safe_open

from microcinema.models.unet3d import UNet3D
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.hashing import hash_file
from microcinema.utils.logging import warn_once

Weights = dict[str, torch.Tensor]
WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers, of peft


@dataclass(frozen=True)
class Lora:
    """A LoRA as the key `lora` names it: a file, a folder, or `owner/name[/file]` of the hub, with `:scale` or without."""

    name: str
    scale: float
    file: Path
    sha256: str

    @classmethod
    def of(cls, text: str) -> "Lora":
        """The LoRA of a text; a UserError if there is none."""
        match = re.fullmatch(r"(.+?)(?::([-+]?\d*\.?\d+))?", text)
        name, scale = match.groups() if match else (text, None)
        file = lora_file(name)
        return cls(name, float(scale or 1), file, hash_file(file))

    @property
    def record(self) -> dict[str, Any]:
        """Of the provenance."""
        return {"name": Path(self.name).name, "scale": self.scale, "sha256": self.sha256}


def lora_file(name: str | os.PathLike[str], weight_name: str | None = None, revision: str | None = None) -> Path:
    """The safetensors file of a LoRA; a UserError if there is none, or more than one."""
    path, text = Path(name), os.fspath(name)
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        usual = [weight_name] if weight_name else [file for file in WEIGHTS if file in files] or files
        if len(usual) != 1 or usual[0] not in files:
            raise UserError(f"LoRA folder '{path}' has the files {', '.join(files) or 'none'} (.safetensors); name one")
        return path / usual[0]
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UserError(f"LoRA '{path}' may be a pickle, which can run code when it is loaded; give a .safetensors")
    if path.is_file():
        return path
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+?)(?:/(.+))?", text)
    if match is None or (path.suffix == ".safetensors" and not match[2]):
        raise UserError(
            f"LoRA '{name}' is neither a file nor a folder nor owner/name[/file] of the hub; check the path"
        )
    advice = f"name a file, as {match[1]}/(file).safetensors, or download it first"
    with user_errors(f"LoRA '{name}' cannot be had from the hub ({{reason}}); {advice}"):
        return Path(hf_hub_download(match[1], weight_name or match[2] or WEIGHTS[0], revision=revision))


def read_lora(source: str | Path | Mapping[str, torch.Tensor], pipeline: Any = None) -> dict[str, Weights]:
    """The weights of a LoRA by component, `unet` and `text_encoder`, and name, `(layer).lora_{A,B}.weight`; scale 1 is as it was trained.

    Args:
        source: a safetensors file, or its tensors by name.
        pipeline: that it is for: files for SDXL number layers by its UNet's `layers_per_block`.

    Raises:
        UserError: it cannot be read, or is no LoRA.
    """
    config = dict(getattr(getattr(pipeline, "unet", None), "config", {}))
    layout = SimpleNamespace(layers_per_block=config.get("unet2d", config).get("layers_per_block", 2))
    parts: dict[str, Weights] = {}
    name = "the LoRA" if isinstance(source, Mapping) else f"LoRA '{source}'"
    advice = "give one of kohya, diffusers or peft; LoHa, LoKr and DoRA do not work"
    with user_errors(f"{name} cannot be read ({{reason}}); {advice}"):
        tensors = _with_alphas(*((dict(source), {}) if isinstance(source, Mapping) else _read(Path(source))))
        for key, value in StableDiffusionXLLoraLoaderMixin.lora_state_dict(tensors, unet_config=layout)[0].items():
            component, _, rest = key.partition(".")
            parts.setdefault(component, {})[rest] = value
        for component, part in parts.items():
            if not any(".lora_A." in key for key in part):
                is_unet = component == "unet"
                convert = convert_unet_state_dict_to_peft if is_unet else convert_state_dict_to_peft
                parts[component] = convert(part if is_unet else convert_state_dict_to_diffusers(part))
        keys = [key for part in parts.values() for key in part] or ["no weights"]
        if wrong := [key for key in keys if not key.endswith((".lora_A.weight", ".lora_B.weight"))]:
            raise ValueError(f"{wrong[0]} is not a LoRA's")
    return parts


def _read(file: Path) -> tuple[Weights, dict[str, Any]]:
    """The tensors of a file, with names as diffusers reads them, and the settings that were saved with it, by component."""
    with safe_open(file, "pt") as content:
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        header = json.loads((content.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if all(key.startswith("base_model.model.") for key in tensors):  # peft's own
        tensors = {f"unet.{key.removeprefix('base_model.model.')}": value for key, value in tensors.items()}
        settings = file.with_name("adapter_config.json")
        saved = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        header = {f"unet.{key}": value for key, value in saved.items()}
    return tensors, header


def _with_alphas(tensors: Weights, header: Mapping[str, Any]) -> Weights:
    """The tensors with `alpha / rank` as a factor of B: kohya stores alphas beside the weights, peft and diffusers as settings."""
    found = {}
    for key, value in tensors.items():
        component, _, rest = key.partition(".")
        if f"{(layer := key.removesuffix('.lora_up.weight'))}.alpha" in tensors:
            value = value.double() * tensors[f"{layer}.alpha"].item() / value.shape[1]
        elif rest.endswith(".lora_B.weight") and (alpha := header.get(f"{component}.lora_alpha")):
            for pattern, own in (header.get(f"{component}.alpha_pattern") or {}).items():
                alpha = own if re.fullmatch(rf"(.*\.)?({pattern})", rest.removesuffix(".lora_B.weight")) else alpha
            rank = value.shape[1]
            value = value.double() * alpha / (rank**0.5 if header.get(f"{component}.use_rslora") else rank)
        if not key.endswith(".alpha"):
            found[key] = value
    return found


def _layer(network: Any, key: str) -> str:
    """The name of the layer that a weight is for: the text encoder's have a prefix in files that it may not have in memory."""
    return key.partition(".lora_")[0].removeprefix("" if hasattr(network, "text_model") else "text_model.")


def misfit(pipeline: Any, parts: Mapping[str, Weights]) -> str | None:
    """What of a LoRA has no place in a pipeline, in a few words; None if all fits."""
    for component, weights in parts.items():
        if (network := getattr(pipeline, component, None)) is None:
            return f"it is for {component}, which the model does not have"
        layers = {name: getattr(layer, "base_layer", layer) for name, layer in network.named_modules()}
        for key, value in weights.items():
            layer: Any = layers.get(_layer(network, key))
            if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                return f"{component} has no layer {_layer(network, key)}"
            axes = slice(1, None) if ".lora_A." in key else slice(0, 1)
            if value.ndim != layer.weight.ndim or value.shape[axes] != layer.weight.shape[axes]:
                return f"{component}.{key} is {tuple(value.shape)} for a layer of {tuple(layer.weight.shape)}"
    return None


def add_lora(pipeline: Any, parts: Mapping[str, Weights], adapter_name: str, name: str) -> None:
    """Adds the layers of a LoRA to a pipeline of diffusers; a UserError, which `name`s it, if it does not fit."""
    if fault := misfit(pipeline, parts):
        raise UserError(f"{name} does not fit the model: {fault}; use one that was made for its base")
    for component, weights in parts.items():
        network = getattr(pipeline, component)
        ranks = {_layer(network, key): value.shape[1] for key, value in weights.items() if ".lora_B." in key}
        rank = next(iter(ranks.values()))
        # A pattern of layers: a list would also name AppearNet's, whose names end alike.
        settings = {"r": rank, "lora_alpha": rank, "rank_pattern": ranks, "alpha_pattern": ranks}
        settings["target_modules"] = f"({'|'.join(map(re.escape, ranks))})"
        state = {f"{component}.{key}": value.to(network.dtype) for key, value in weights.items()}
        metadata = {f"{component}.{key}": value for key, value in settings.items()}
        arguments: dict[str, Any] = {"network_alphas": None, "metadata": metadata, "adapter_name": adapter_name}
        if component == "unet":
            StableDiffusionXLLoraLoaderMixin.load_lora_into_unet(state, unet=network, _pipeline=pipeline, **arguments)
        else:
            arguments |= {"text_encoder": network, "prefix": component, "_pipeline": pipeline}
            StableDiffusionXLLoraLoaderMixin.load_lora_into_text_encoder(state, **arguments)


class VideoLoraMixin(StableDiffusionXLLoraLoaderMixin):
    """The methods of diffusers for LoRA, for a pipeline with a `unet` and a `text_encoder`: `set_adapters`, `fuse_lora`, `disable_lora` ..."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Loads a LoRA into UNet and text encoder; call `set_adapters` to use several at once, or with other scales.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file, a folder, a hub repository, or tensors by name.
            adapter_name: for `set_adapters`; None: `default_{i}`.
            weight_name, revision: the file's name in the folder or repository, and the repository's branch, tag or commit.

        Raises:
            UserError: there is no such file, it is a pickle or no LoRA, or it has weights for layers that the model does not have.
        """
        source = pretrained_model_name_or_path_or_dict
        source = source if isinstance(source, Mapping) else lora_file(source, weight_name, revision)
        known = {name for names in self.get_list_adapters().values() for name in names}
        adapter_name = adapter_name or f"default_{len(known)}"
        if adapter_name in known:
            raise UserError(f"adapter '{adapter_name}' is loaded already; give another adapter_name, or unload it")
        name = "the LoRA" if isinstance(source, Mapping) else f"LoRA '{source}'"
        add_lora(self, read_lora(source, self), adapter_name, name)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but with a LoRA loaded a UserError: its layers would be in the file, and no network have them."""
        if any(self.get_list_adapters().values()):
            raise UserError("a LoRA is loaded; call fuse_lora(), if it shall stay, and then unload_lora_weights()")
        super().save_pretrained(*args, **kwargs)


def fuse_loras(pipeline: Any, loras: Sequence[Lora], only_fitting: bool = False) -> list[Lora]:
    """Makes LoRAs part of the weights of a pipeline, which then costs what it cost without them; returns those that it took.

    One that does not fit is a UserError, or with `only_fitting`, for stage 1, left out, as is one of temporal layers.
    """
    taken: list[Lora] = []
    for lora in loras:
        parts = read_lora(lora.file, pipeline)
        if only_fitting and any(key.startswith(UNet3D.new_prefixes) for key in parts.get("unet", ())):
            continue
        if only_fitting and (fault := misfit(pipeline, parts)):
            warn_once(f"stage 1 draws without LoRA '{lora.name}', which is not for it ({fault})")
            continue
        add_lora(pipeline, parts, f"lora_{len(taken)}", f"LoRA '{lora.name}'")
        taken.append(lora)
    if taken:
        names = [f"lora_{i}" for i in range(len(taken))]
        pipeline.set_adapters(names, [lora.scale for lora in taken])
        pipeline.fuse_lora(adapter_names=names)
        pipeline.unload_lora_weights()
    return taken
