"""Memory of a pipeline: dtype and storage, offloading, slicing, tiling and previews of the VAE, attention kernels, compilation."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline

from microcinema.config.sampling import MemorySettings
from microcinema.models.int8 import quantize_frozen
from microcinema.models.vae import overflows, vae_scale_factor
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.loading import load_component, resolve_snapshot
from microcinema.utils.errors import UserError, user_errors


def apply(pipeline: DiffusionPipeline, settings: MemorySettings, device: torch.device | str) -> None:
    """Applies memory settings to a newly opened pipeline of diffusers and moves it to a device; a UserError for a setting that this machine
    or this pipeline does not support."""
    device, dtype = torch.device(device), getattr(torch, settings.torch_dtype)
    networks: dict[str, Any] = {
        name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
    }
    denoiser = networks.get("unet", networks.get("transformer"))
    if settings.offload != "none" and device.type == "cpu":
        raise UserError(f"offload={settings.offload} saves GPU memory, and the device is the CPU; use offload=none")
    if settings.attention == "xformers":
        if find_spec("xformers") is None:
            advice = 'pip install "microcinema[xformers]", or use attention=sdpa'
            raise UserError(f"attention=xformers, but xformers is not installed; {advice}")
        if device.type != "cuda":
            raise UserError(f"attention=xformers runs on CUDA devices only, not on {device}; use attention=sdpa")
    for option, unset in (("compile", "false"), ("quantization", "null")):
        if getattr(settings, option) and denoiser is None:
            name = type(pipeline).__name__
            raise UserError(f"{option} is set, but {name} has neither a unet nor a transformer; use {option}={unset}")
    for option in ("slicing", "tiling"):
        if getattr(settings, f"vae_{option}") and "vae" in networks:
            vae = type(networks["vae"]).__name__
            with user_errors(f"vae_{option}=true, but {vae} does not support it; use vae_{option}=false"):
                getattr(networks["vae"], f"enable_{option}")()
    for name, network in networks.items():
        # Networks opened in another dtype may keep a few layers in float32; those stay. Other pipelines upcast their VAE themselves.
        keeps = isinstance(pipeline, ImageToVideoPipeline) and name == "vae" and overflows(network, dtype)
        if network.dtype != dtype and not keeps:
            torch.nn.Module.to(network, dtype)
    if settings.quantization is not None and denoiser is not None:
        quantize_frozen(denoiser.requires_grad_(False))
    if settings.preview_vae is not None and isinstance(pipeline, ImageToVideoPipeline):
        pipeline.preview_vae = load_preview_vae(settings.preview_vae, pipeline.vae, dtype).to(device)
    if device.type == "cuda" and "vae" in networks:
        networks["vae"].to(memory_format=torch.channels_last)  # tensor cores want it; it changes no value
    if settings.attention == "xformers":
        pipeline.enable_xformers_memory_efficient_attention()
    if settings.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif settings.offload == "group":
        group_offload(pipeline, device)
    elif settings.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    if settings.compile and denoiser is not None:
        denoiser.compile()


def group_offload(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Group offloading of diffusers, each layer a group; on CUDA a stream fetches the next one while a layer computes."""
    pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    for network in pipeline.components.values():
        for module in network.modules() if isinstance(network, torch.nn.Module) else ():
            # Others read its parameters, so that no call of its own would fetch them; they are small.
            if isinstance(module, torch.nn.ParameterDict) and (hooks := getattr(module, "_diffusers_hook", None)):
                hooks.get_hook("group_offloading").group.onload_()
                hooks.remove_hook("group_offloading")


def load_preview_vae(name: str, vae: AutoencoderKL, dtype: torch.dtype) -> AutoencoderTiny:
    """The frozen `AutoencoderTiny` of a folder or a hub repository; a UserError if it does not decode the latents of a VAE."""
    tiny = load_component(Path(resolve_snapshot(name, ["."])), AutoencoderTiny, dtype=dtype)
    for what, size in {
        "latent channels": lambda x: x.config["latent_channels"],
        "pixels per latent": vae_scale_factor,
    }.items():
        if size(tiny) != size(vae):
            raise UserError(
                f"preview_vae '{name}' has {size(tiny)} {what}, the model's VAE {size(vae)}; use one for its base"
            )
    return tiny
