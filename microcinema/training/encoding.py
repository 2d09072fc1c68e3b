"""From the items of a data set to what the networks see: VAE latents and text embeddings, by frozen encoders."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL

from microcinema.diffusion.randomness import generator
from microcinema.training.step import Batch

_POSTERIOR = 1  # second number of a clip's generator: the noise of the VAE's posterior, apart from that of diffusion


class TextCache:
    """Embeddings of captions, the most recently used kept in memory; small worlds repeat their captions.

    Captions are encoded one at a time, so that an embedding has the same bits whatever was in memory or in the batch.

    Args:
        encode: takes one caption in a list, returns its embedding (1, n, d).
        capacity: embeddings to keep.
    """

    def __init__(self, encode: Callable[[list[str]], torch.Tensor], capacity: int = 4096) -> None:
        self.encode = encode
        self.capacity = capacity
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """Embeddings (b, n, d)."""
        return torch.cat([self._one(caption) for caption in captions])

    def _one(self, caption: str) -> torch.Tensor:
        embedding = self._kept.pop(caption, None)
        if embedding is None:
            with torch.no_grad():
                embedding = self.encode([caption])
        self._kept[caption] = embedding
        if len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return embedding


@torch.no_grad()
def sample_latents(vae: AutoencoderKL, video: torch.Tensor, seed: int, numbers: Sequence[int]) -> torch.Tensor:
    """Scaled latents (b, f, c, h, w), float32, drawn from the VAE's posterior with each clip's own generator.

    One clip at a time: bounded memory, and latents that do not depend on the batch.

    Args:
        video: pixels in [-1, 1], (b, f, 3, H, W).
        numbers: of the clips in the global order.
    """
    latents = []
    for frames, number in zip(video, numbers, strict=True):
        posterior = vae.encode(frames.to(vae.dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator(seed, number, _POSTERIOR))
        drawn = (posterior.mean + posterior.std * noise.to(posterior.mean)).float()
        latents.append((drawn - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor)
    return torch.stack(latents)


class BatchEncoder:
    """Turns a collated batch of items (`video` or scaled `latents`, `caption`, `fps`, `number`) into a `Batch` on the device."""

    def __init__(self, vae: AutoencoderKL, embed: TextCache, seed: int, device: torch.device) -> None:
        self.vae = vae
        self.embed = embed
        self.seed = seed
        self.device = device

    def __call__(self, items: Mapping[str, Any]) -> Batch:
        numbers = items["number"].tolist()
        if "latents" in items:
            latents = items["latents"].to(self.device, torch.float32, non_blocking=True)
        else:
            latents = sample_latents(self.vae, items["video"].to(self.device, non_blocking=True), self.seed, numbers)
        return Batch(latents, self.embed(items["caption"]), items["fps"].to(self.device, torch.float32), numbers)
