"""From the items of a data set to what the networks see: latents, text, key frames and flow, by frozen encoders."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from microcinema.data.keyframe_index import keyframe_index
from microcinema.data.optical_flow import Flow
from microcinema.models.vae import encode_pixels
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training.loss import Batch, Dropped
from microcinema.utils.errors import UserError


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

    Items have `sample_index`, `fps`, `caption` (a model that reads motion apart: `description` and `motion`), `video` (f, 3, H, W) or scaled
    `latents` with, if the model reads pixels, `keyframe` uint8 (3, H, W); and for PredictNet `flow` and `flow_valid` on the latent grid.
    Where they have `text`, `motion_tokens` or `image_tokens` as well, these are taken, and their encoders not run.

    Args:
        pipeline: the model, whose frozen encoders are used.
        device: to compute on.
        empty: of `EncodedClips`: tokens of the empty caption, by the names above, where the items bring tokens.
    """

    def __init__(
        self, pipeline: ImageToVideoPipeline, device: torch.device, empty: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.pipeline = pipeline
        self.device = device
        self.empty = dict(empty or {})
        # In float32 between the encoders and the loss, whatever the encoders work in.
        self.embed = TextCache(lambda captions: pipeline.encode_text(captions).float())
        self.embed_motion = TextCache(lambda captions: pipeline.encode_motion(captions).float())

    def __call__(self, items: Mapping[str, Any]) -> Batch:
        """The batch.

        Raises:
            UserError: latents without key frames for a model that reads their pixels.
        """
        flow = None
        if "flow" in items:
            flow = Flow(self._given(items["flow"]), items["flow_valid"].to(self.device))
        return Batch(
            latents=self.latents(items),
            text=self.text(items),
            fps=self._given(items["fps"]),
            numbers=items["sample_index"].tolist(),
            image=self._read_keyframes(items),
            motion_tokens=self.motion_tokens(items),
            flow=flow,
        )

    def latents(self, items: Mapping[str, Any]) -> torch.Tensor:
        """Of clips, (b, f, c, h, w), float32."""
        if "latents" in items:
            return self._given(items["latents"])
        # One clip at a time: bounded memory, and latents that do not depend on the batch.
        video = items["video"].to(self.device, non_blocking=True)
        return torch.cat([encode_pixels(self.pipeline.vae, clip) for clip in video.split(1)])

    def text(self, items: Mapping[str, Any]) -> torch.Tensor:
        """Of captions, (b, n, d), float32."""
        if "text" in items:
            return self._given(items["text"])
        return self.embed(items["description" if self.pipeline.uses_motion_caption else "caption"])

    def motion_tokens(self, items: Mapping[str, Any]) -> torch.Tensor | None:
        """Of motion captions, (b, k, e), float32; None: the model does not read them."""
        if not self.pipeline.uses_motion_caption:
            return None
        return self._given(items["motion_tokens"]) if "motion_tokens" in items else self.embed_motion(items["motion"])

    def pixels(self, items: Mapping[str, Any]) -> torch.Tensor:
        """Of key frames, (b, 3, H, W) in [-1, 1].

        Raises:
            UserError: the items bring none.
        """
        if "video" in items:
            frames = items["video"]
            return frames[:, keyframe_index(self.pipeline.keyframe_position, frames.shape[1])].to(self.device)
        if "keyframe" not in items:
            raise UserError(
                "the model reads the key frames' pixels, which these latents come without; encode them again"
            )
        return self._given(items["keyframe"]) / 127.5 - 1

    def dropped(self) -> Dropped:
        """What stands for dropped captions, from the same source as the tokens of the others."""
        empty = {name: self._given(tokens) for name, tokens in self.empty.items()}
        nothing = {**empty, **{name: [""] for name in ("caption", "description", "motion")}}
        return Dropped(self.text(nothing), self.motion_tokens(nothing))

    def _given(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, torch.float32, non_blocking=True)

    @torch.no_grad()
    def _read_keyframes(self, items: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        if not self.pipeline.uses_image_conditioning:
            return {}
        tokens = self._given(items["image_tokens"]) if "image_tokens" in items else None
        if tokens is not None and not self.pipeline.uses_keyframe_pixels:
            return {"image_tokens": tokens}
        return self.pipeline.encode_pixels(self.pixels(items), tokens)
