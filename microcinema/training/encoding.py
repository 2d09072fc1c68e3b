"""From the items of a data set to what the networks see: VAE latents and text embeddings, by frozen encoders."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL

from microcinema.data.latents import encode
from microcinema.training.step import Batch


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


class BatchEncoder:
    """Turns a collated batch of items (`video` or scaled `latents`, `caption`, `fps`, `number`) into a `Batch` on the device."""

    def __init__(self, vae: AutoencoderKL, embed: TextCache, device: torch.device) -> None:
        self.vae = vae
        self.embed = embed
        self.device = device

    def __call__(self, items: Mapping[str, Any]) -> Batch:
        numbers = items["number"].tolist()
        if "latents" in items:
            latents = items["latents"].to(self.device, torch.float32, non_blocking=True)
        else:
            # One clip at a time: bounded memory, and latents that do not depend on the batch.
            video = items["video"].to(self.device, non_blocking=True)
            latents = torch.cat([encode(self.vae, clip) for clip in video.split(1)])
        return Batch(latents, self.embed(items["caption"]), items["fps"].to(self.device, torch.float32), numbers)
