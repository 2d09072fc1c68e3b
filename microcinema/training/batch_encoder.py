"""Turns the items of a data set into the networks' inputs, by frozen encoders: latents, text, key frames and flow."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import record_function

from microcinema.data.keyframe_index import keyframe_index
from microcinema.data.optical_flow import Flow
from microcinema.models.vae import encode_pixels
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training.loss import Batch, NullConditioning
from microcinema.utils.device import to_device
from microcinema.utils.errors import UserError

Region = Callable[[str], AbstractContextManager[Any]]
"""Marks a named part of the training step, as `torch.profiler.record_function` does."""


@dataclass
class BatchEncoder:
    """Turns a collated batch of items into a `Batch` on the device.

    Items have `sample_index`, `fps`, `caption` (for a model with a motion encoder: `description` and `motion`), `video` uint8 (f, 3, H, W) or
    scaled `latents` with, if the model uses pixels, `keyframe` uint8 (3, H, W); and for PredictNet `flow` and `flow_valid` on the
    latent grid; and for a model that is told it, `motion_score`. If they have `text`, `motion_tokens` or `image_tokens`, these are used and the encoders do not run.

    Args:
        pipeline: with its frozen encoders.
        empty: of `EncodedClips`: tokens of the empty caption, by the names above, if the items bring tokens.
        region: marks the regions `VAE` and `encoders` for a profiler.
    """

    pipeline: ImageToVideoPipeline
    device: torch.device
    empty: Mapping[str, torch.Tensor] = field(default_factory=dict)
    region: Region = record_function
    _null: NullConditioning | None = field(default=None, init=False)

    def __call__(self, items: Mapping[str, Any]) -> Batch:
        """The batch; a UserError if a model that uses pixels gets latents without key frames."""
        has_flow = "flow" in items
        return Batch(
            latents=self.latents(items),
            text=self.text(items),
            fps=self._to_device(items["fps"]),
            indices=items["sample_index"].tolist(),
            image=self._image_inputs(items),
            motion_tokens=self.motion_tokens(items),
            flow=Flow(self._to_device(items["flow"]), to_device(items["flow_valid"], self.device))
            if has_flow
            else None,
            motion_score=self.motion_score(items),
        )

    def latents(self, items: Mapping[str, Any]) -> torch.Tensor:
        """Scaled latents of clips, (b, f, c, h, w), float32."""
        if "latents" in items:
            return self._to_device(items["latents"])
        # One clip at a time: bounded memory, and latents that do not depend on the batch.
        video = to_device(items["video"], self.device)
        with self.region("VAE"):
            return torch.cat([encode_pixels(self.pipeline.vae, self._to_pixels(clip)) for clip in video.split(1)])

    def text(self, items: Mapping[str, Any]) -> torch.Tensor:
        """Embeddings of captions, (b, n, d), float32."""
        if "text" in items:
            return self._to_device(items["text"])
        captions = items["description" if self.pipeline.uses_motion_caption else "caption"]
        return self._embed(self.pipeline.encode_text, captions)

    def motion_tokens(self, items: Mapping[str, Any]) -> torch.Tensor | None:
        """Tokens of motion captions, (b, k, e), float32; None for a model without a motion encoder."""
        if not self.pipeline.uses_motion_caption:
            return None
        if "motion_tokens" in items:
            return self._to_device(items["motion_tokens"])
        return self._embed(self.pipeline.encode_motion, items["motion"])

    def motion_score(self, items: Mapping[str, Any]) -> torch.Tensor | None:
        """Motion scores, (b,), float32; None for a model without them, a UserError if the items have none."""
        if not self.pipeline.unet.options.motion_score:
            return None
        if "motion_score" not in items:
            raise UserError("the model needs motion scores, which these clips do not have; wrap them in MotionClips")
        return self._to_device(items["motion_score"])

    def pixels(self, items: Mapping[str, Any]) -> torch.Tensor:
        """Pixels of key frames, (b, 3, H, W) in [-1, 1]; a UserError if the items have none."""
        if "video" in items:
            frames = items["video"]
            return self._to_pixels(frames[:, keyframe_index(self.pipeline.keyframe_position, frames.shape[1])])
        if "keyframe" not in items:
            raise UserError("the model needs pixels, which these cached latents do not include; encode them again")
        return self._to_pixels(items["keyframe"])

    def null_conditioning(self) -> NullConditioning:
        """Replaces dropped captions; from the same source as the tokens of the others, encoded once."""
        if self._null is None:
            items = {**self.empty, **{name: [""] for name in ("caption", "description", "motion")}}
            self._null = NullConditioning(self.text(items), self.motion_tokens(items))
        return self._null

    @torch.no_grad()
    def _embed(self, encode: Callable[[list[str]], torch.Tensor], captions: Sequence[str]) -> torch.Tensor:
        """Embeddings in float32, whatever dtype the encoder computes in, of all captions at once; of equal ones only the first is encoded."""
        distinct = list(dict.fromkeys(captions))
        with self.region("encoders"):
            embeddings = encode(distinct).float().split(1)
        return torch.cat([embeddings[distinct.index(caption)] for caption in captions])

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_device(tensor, self.device).float()

    def _to_pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames in [-1, 1], which only the device holds: they travel as uint8, in a quarter of the bytes."""
        if frames.dtype != torch.uint8:
            raise UserError(f"frames of the clips are {frames.dtype}; a data set gives them as uint8, from 0 to 255")
        return self._to_device(frames) / 127.5 - 1

    @torch.no_grad()
    def _image_inputs(self, items: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        if not self.pipeline.uses_image_conditioning:
            return {}
        tokens = self._to_device(items["image_tokens"]) if "image_tokens" in items else None
        if tokens is not None and not self.pipeline.uses_keyframe_pixels:
            return {"image_tokens": tokens}
        with self.region("encoders"):
            return self.pipeline.encode_pixels(self.pixels(items), tokens)
