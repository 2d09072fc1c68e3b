"""How a pipeline uses memory: type of its numbers, where networks wait, the VAE in parts, kernels of attention, compilation."""

from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Literal, get_args, get_type_hints

import torch
from diffusers import DiffusionPipeline

from microcinema.utils.errors import UserError


@dataclass(frozen=True)
class MemorySettings:
    """What to give for memory. Frames stay the same up to rounding, except with `vae_tiling`.

    Args:
        torch_dtype: of the networks; latents and the schedule stay in float32.
        offload: where networks wait for their turn. `none`: on the device; `model`: in the CPU's memory, each network comes to the
            device as a whole; `sequential`: each layer comes alone, which needs least memory and takes by far the longest.
        vae_slicing: the VAE reads and makes one frame at a time.
        vae_tiling: it does so in overlapping tiles, which are blended, if frames are larger than it was trained with. Its layers
            that look at whole frames see tiles then, so that this changes frames more than rounding does.
        attention: `sdpa`, torch's scaled-dot-product attention, or `xformers` in all spatial layers.
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
        hints = get_type_hints(type(self))
        for name in (field.name for field in fields(self)):
            value, known = getattr(self, name), get_args(hints[name])
            if known and value not in known:
                raise UserError(f"{name} is {value!r}; use one of {', '.join(known)}")
        if self.compile and self.offload == "sequential":
            raise UserError("compile=true and offload=sequential exclude each other; use offload=model, or none")

    @property
    def dtype(self) -> torch.dtype:
        """`torch_dtype` as torch knows it."""
        return getattr(torch, self.torch_dtype)


def apply(pipeline: DiffusionPipeline, settings: MemorySettings, device: torch.device | str) -> None:
    """Sets up a pipeline of diffusers and brings it to the device; what is not asked for stays as it is.

    Args:
        pipeline: freshly opened, best in the wanted type already.
        device: to compute on.

    Raises:
        UserError: something that this machine or this pipeline does not have.
    """
    device, name = torch.device(device), type(pipeline).__name__
    if settings.offload != "none" and device.type == "cpu":
        raise UserError(
            f"offload={settings.offload} saves the memory of an accelerator, and there is none; use offload=none"
        )
    if settings.attention == "xformers":
        if find_spec("xformers") is None:
            raise UserError(
                'attention=xformers, but xformers is not installed; pip install "microcinema[xformers]", or use attention=sdpa'
            )
        if device.type != "cuda":
            raise UserError(f"attention=xformers runs on CUDA devices alone, not on {device}; use attention=sdpa")
    networks = {key: part for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    denoiser = networks.get("unet", networks.get("transformer"))
    if settings.compile and denoiser is None:
        raise UserError(f"compile=true, but {name} has neither a unet nor a transformer; use compile=false")
    for part in ("slicing", "tiling"):
        if getattr(settings, f"vae_{part}") and "vae" in networks:
            try:
                getattr(networks["vae"], f"enable_{part}")()
            except (AttributeError, NotImplementedError):
                kind = type(networks["vae"]).__name__
                raise UserError(f"vae_{part}=true, but the {kind} of {name} cannot; use vae_{part}=false") from None

    for network in networks.values():
        # Some networks keep a few layers in float32 when they are opened in another type; those are left as they are.
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
    if settings.compile:
        assert denoiser is not None
        denoiser.compile()
