"""Memory of a pipeline: dtype, offloading, slicing and tiling of the VAE, attention kernels, compilation."""

from importlib.util import find_spec

import torch
from diffusers import DiffusionPipeline

from microcinema.config.sampling import MemorySettings
from microcinema.utils.errors import UserError


def apply(pipeline: DiffusionPipeline, settings: MemorySettings, device: torch.device | str) -> None:
    """Applies memory settings to a newly opened pipeline of diffusers and moves it to a device.

    Raises:
        UserError: a setting that this machine or this pipeline does not support.
    """
    device, dtype = torch.device(device), getattr(torch, settings.torch_dtype)
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    denoiser = networks.get("unet", networks.get("transformer"))
    if settings.offload != "none" and device.type == "cpu":
        raise UserError(f"offload={settings.offload} saves GPU memory, and the device is the CPU; use offload=none")
    if settings.attention == "xformers":
        if find_spec("xformers") is None:
            advice = 'pip install "microcinema[xformers]", or use attention=sdpa'
            raise UserError(f"attention=xformers, but xformers is not installed; {advice}")
        if device.type != "cuda":
            raise UserError(f"attention=xformers runs on CUDA devices only, not on {device}; use attention=sdpa")
    if settings.compile and denoiser is None:
        name = type(pipeline).__name__
        raise UserError(f"compile=true, but {name} has neither a unet nor a transformer; use compile=false")
    for option in ("slicing", "tiling"):
        if getattr(settings, f"vae_{option}") and "vae" in networks:
            try:
                getattr(networks["vae"], f"enable_{option}")()
            except (AttributeError, NotImplementedError):
                vae = type(networks["vae"]).__name__
                raise UserError(f"vae_{option}=true, but {vae} does not support it; use vae_{option}=false") from None
    for network in networks.values():
        # Networks opened in another dtype may keep a few layers in float32; those stay.
        if network.dtype != dtype:
            torch.nn.Module.to(network, dtype)
    if settings.attention == "xformers":
        pipeline.enable_xformers_memory_efficient_attention()
    if settings.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif settings.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    if settings.compile and denoiser is not None:
        denoiser.compile()
