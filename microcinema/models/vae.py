"""From pixels to latents and back: the only place that applies a VAE's shift and scale.

Shapes: b clips, f frames, c latent channels, H W pixels, h w latent grid (`H = s h`, s the scale factor).

    z = (mean of the posterior - shift_factor) * scaling_factor          pixels in [-1, 1]
    pixels = decoder(z / scaling_factor + shift_factor)

The VAEs of Stable Diffusion have no shift.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from einops import pack, unpack
from torch import Tensor

from microcinema.utils.errors import UserError

VAE: TypeAlias = AutoencoderKL | AutoencoderTiny


def vae_scale_factor(vae: VAE) -> int:
    """Pixels per latent position, in each direction."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def scale_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents as the denoiser sees them: shifted, then scaled."""
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config["scaling_factor"]


def unscale_latents(vae: VAE, z: Tensor) -> Tensor:
    """The inverse of `scale_latents`."""
    return z / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0.0)


def overflows(vae: VAE, dtype: torch.dtype) -> bool:
    """Whether a VAE, as SDXL's, has activations too large for this type, by its config."""
    return dtype == torch.float16 and bool(vae.config.get("force_upcast"))


def _precision(vae: VAE, device: torch.device) -> AbstractContextManager[None]:
    """Autocast as it is, but none where the VAE would overflow."""
    upcast = vae.config.get("force_upcast") and overflows(vae, torch.get_autocast_dtype(device.type))
    return torch.autocast(device.type, enabled=False) if upcast else nullcontext()


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Tensor, device: torch.device | None = None) -> Tensor:
    """Scaled latents `b f c h w` or `b c h w`, float32, of clips or images: the posterior's mean.

    Args:
        pixels: `b f 3 H W` or `b 3 H W` in [-1, 1].
        device: to compute on; None: where the VAE is. With offloading that is elsewhere until it is called.

    Raises:
        UserError: H or W is not a multiple of the scale factor.
    """
    factor = vae_scale_factor(vae)
    height, width = pixels.shape[-2:]
    if height % factor or width % factor:
        raise UserError(f"frames are {height}x{width}, but VAE factor {factor} needs multiples of {factor}")
    images, leading = pack([pixels], "* c h w")
    images = images.to(device or vae.device, vae.dtype)
    with _precision(vae, images.device):
        mean = vae.encode(images).latent_dist.mean
    return unpack(scale_latents(vae, mean.float()), leading, "* c h w")[0]


def decode_latents(vae: VAE, z: Tensor, chunk_size: int | None = None) -> Tensor:
    """Pixels `b f 3 H W` or `b 3 H W`, in about [-1, 1] and the VAE's dtype, of scaled latents on the device to compute on.

    Args:
        z: `b f c h w` or `b c h w`.
        chunk_size: images decoded at once, halved while a GPU has no memory for them; None: as many as its free memory is thought to
            hold, on a CPU all.
    """
    images, leading = pack([unscale_latents(vae, z)], "* c h w")
    images = images.to(vae.dtype)
    chunk_size = min(chunk_size or images_at_once(vae, images), len(images))
    while True:
        try:
            with _precision(vae, images.device):
                pixels = [vae.decode(chunk).sample for chunk in images.split(chunk_size)]
            return unpack(torch.cat(pixels), leading, "* c h w")[0]
        except torch.OutOfMemoryError:
            if chunk_size == 1:
                raise
        chunk_size = (chunk_size + 1) // 2  # only here, where what the failed try held is released


def images_at_once(vae: VAE, images: Tensor) -> int:
    """Of latents `n c h w`, how many the free memory of their device lets a VAE decode at once; on a CPU all n."""
    if images.device.type != "cuda":
        return len(images)
    cached = torch.cuda.memory_reserved(images.device) - torch.cuda.memory_allocated(images.device)
    free = torch.cuda.mem_get_info(images.device)[0] + cached
    return max(1, min(len(images), int(free / decoding_bytes(vae, images))))


def decoding_bytes(vae: VAE, images: Tensor) -> int:
    """Bytes to be free for each of the latents `n c h w` that a VAE of diffusers decodes at once.

    It holds most in its last block, three maps of the frame's size with the channels of the block before; a fourth is the margin.
    """
    channels, (height, width) = vae.config["block_out_channels"][:2][-1], images.shape[-2:]
    return 4 * channels * vae_scale_factor(vae) ** 2 * height * width * images.element_size()
