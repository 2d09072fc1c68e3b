"""Memory of a pipeline: dtype, offloading, slicing and tiling of the VAE, attention kernels, compilation."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args, get_type_hints

import torch
from diffusers import DiffusionPipeline

from microcinema.utils.errors import UserError, check_choice


@dataclass(frozen=True)
class MemorySettings:
    """Settings that trade time for memory. Frames stay the same up to rounding, except with `vae_tiling`.

    Args:
        torch_dtype: of the networks; latents and schedule stay in float32.
        offload: where networks wait until they are used. `none`: on the device; `model`: in CPU memory, and each network is moved to
            the device as a whole; `sequential`: the same for each layer, which needs the least memory and is by far the slowest.
        vae_slicing: the VAE encodes and decodes one frame at a time.
        vae_tiling: the VAE encodes and decodes frames larger than it was trained with in overlapping tiles, which are blended. Its
            attention then sees a tile instead of the whole frame, which changes frames by more than rounding.
        attention: `sdpa`, torch's scaled dot-product attention, or `xformers` in all spatial layers.
        compile: compile the denoiser with torch.compile; the first step takes minutes.

    Raises:
        UserError: an unknown choice, or two that exclude each other.
    """

    torch_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    offload: Literal["none", "model", "sequential"] = "none"
    vae_slicing: bool = False
    vae_tiling: bool = False
    attention: Literal["sdpa", "xformers"] = "sdpa"
    compile: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if choices := get_args(hint):
                check_choice(name, getattr(self, name), choices)
        if self.compile and self.offload == "sequential":
            raise UserError("compile=true and offload=sequential exclude each other; use offload=model, or none")

    @property
    def dtype(self) -> torch.dtype:
        """`torch_dtype` as a dtype of torch."""
        return getattr(torch, self.torch_dtype)


def apply(pipeline: DiffusionPipeline, settings: MemorySettings, device: torch.device | str) -> None:
    """Applies memory settings to a newly opened pipeline of diffusers and moves it to a device.

    Raises:
        UserError: a setting that this machine or this pipeline does not support.
    """
    device = torch.device(device)
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
        if network.dtype != settings.dtype:
            torch.nn.Module.to(network, settings.dtype)
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
