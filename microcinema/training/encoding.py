"""From the items of a data set to what the networks see: latents, text, key frames and flow, by frozen encoders."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from microcinema.data.flow import Flow
from microcinema.data.latents import encode
from microcinema.data.reference import reference_index
from microcinema.errors import UserError
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training.step import Batch, Dropped


class TextCache:
    """Embeddings or tokens of captions, the most recently used kept in memory; small worlds repeat their captions.

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
    """Turns a collated batch of items into a `Batch` on the device.

    Items have `number`, `fps`, `caption` (a model that reads motion apart: `description` and `motion`), `video` (f, 3, H, W) or scaled
    `latents` with, if the model reads pixels, `keyframe` uint8 (3, H, W); and for PredictNet `flow` and `flow_valid` on the latent grid.

    Args:
        pipeline: the model, whose frozen encoders are used.
        device: to compute on.
    """

    def __init__(self, pipeline: ImageToVideoPipeline, device: torch.device) -> None:
        self.pipeline = pipeline
        self.device = device
        # In float32 between the encoders and the loss, whatever the encoders work in.
        self.embed = TextCache(lambda captions: pipeline.encode_text(captions).float())
        self.embed_motion = TextCache(lambda captions: pipeline.encode_motion(captions).float())

    def __call__(self, items: Mapping[str, Any]) -> Batch:
        """The batch.

        Raises:
            UserError: latents without key frames for a model that reads their pixels.
        """
        numbers = items["number"].tolist()
        if "latents" in items:
            latents = items["latents"].to(self.device, torch.float32, non_blocking=True)
        else:
            # One clip at a time: bounded memory, and latents that do not depend on the batch.
            video = items["video"].to(self.device, non_blocking=True)
            latents = torch.cat([encode(self.pipeline.vae, clip) for clip in video.split(1)])
        apart = self.pipeline.reads_motion
        text = self.embed(items["description" if apart else "caption"])
        motion = self.embed_motion(items["motion"]) if apart else None
        flow = None
        if "flow" in items:
            flow = Flow(items["flow"].to(self.device, torch.float32), items["flow_valid"].to(self.device))
        fps = items["fps"].to(self.device, torch.float32)
        return Batch(latents, text, fps, numbers, self._read_keyframes(items), motion, flow)

    def dropped(self) -> Dropped:
        """What stands for dropped captions."""
        return Dropped(self.embed([""]), self.embed_motion([""]) if self.pipeline.reads_motion else None)

    @torch.no_grad()
    def _read_keyframes(self, items: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        if not self.pipeline.reads_pixels:
            return {}
        if "video" in items:
            frames = items["video"]
            pixels = frames[:, reference_index(self.pipeline.reference_frame, frames.shape[1])]
        elif "keyframe" in items:
            pixels = items["keyframe"].float() / 127.5 - 1
        else:
            raise UserError(
                "the model reads the key frames' pixels, which these latents come without; encode them again"
            )
        return self.pipeline.encode_pixels(pixels.to(self.device))
