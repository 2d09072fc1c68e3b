"""The captions of a call: texts that the pipeline encodes, or embeddings in their place, such as compel's with weighted words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from microcinema.pipelines.clip_sampler import repeat_to
from microcinema.pipelines.encoders import unread_texts
from microcinema.pipelines.prompts import broadcast_to_prompts, check_motion_prompt, check_prompts
from microcinema.utils.errors import UserError
from microcinema.utils.logging import warn_once


@dataclass(frozen=True)
class Captions:
    """Texts and embeddings as arguments of `ImageToVideoPipeline.__call__`; a UserError for no prompt, or both a text and its embeddings."""

    prompt: str | Sequence[str] | None
    motion_prompt: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if getattr(self, name) is not None and getattr(self, f"{name}_embeds") is not None:
                raise UserError(f"{name} and {name}_embeds are both given; give one of the two")
        if self.prompt_embeds is None:
            check_prompts(self.prompt or "")

    @property
    def count(self) -> int:
        """Of the prompts."""
        return len(check_prompts(self.prompt or "") if self.prompt_embeds is None else self.prompt_embeds)

    def encode(self, pipeline: Any, videos: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The captions of `prepare_conditions`, for so many videos. What an encoder does not read of a text is told."""
        texts = self._texts(pipeline.uses_motion_caption)
        for name, length in pipeline.text_lengths.items():
            for caption in texts[name]:
                for end in unread_texts({name: length}, {name: caption}).values():
                    warn_once(f"{name} '{caption}' is read without its end '{end}'")
        given = {"prompt": self.prompt_embeds, "negative_prompt": self.negative_prompt_embeds}
        text, null = (
            pipeline.encode_text(texts[name]) if value is None else value.to(pipeline._execution_device)
            for name, value in given.items()
        )
        width = pipeline.unet.options.unet2d["cross_attention_dim"]
        if text.shape[1:] != null.shape[1:] or text.ndim != 3 or text.shape[2] != width or self.count % len(null):
            shapes = f"the embeddings of prompt and negative prompt are {tuple(text.shape)} and {tuple(null.shape)}"
            raise UserError(f"{shapes}; give (prompts, tokens, {width}) and as many tokens of both")
        captions: dict[str, tuple[torch.Tensor, torch.Tensor]] = {"text": (text, null)}
        if pipeline.uses_motion_caption:
            captions["motion_tokens"] = pipeline.encode_motion(texts["motion_prompt"]), pipeline.encode_motion([""])
        return {name: (repeat_to(c, videos), repeat_to(empty, videos)) for name, (c, empty) in captions.items()}

    def _texts(self, uses_motion_caption: bool) -> dict[str, list[str]]:
        check_motion_prompt(self.motion_prompt, uses_motion_caption)
        if self.prompt_embeds is not None and uses_motion_caption and self.motion_prompt is None:
            raise UserError("prompt_embeds say nothing to this model's motion encoder; give a motion_prompt as well")
        prompts = [] if self.prompt_embeds is not None else check_prompts(self.prompt or "")
        motions = (
            [] if self.motion_prompt is None else broadcast_to_prompts("motion prompts", self.motion_prompt, self.count)
        )
        negative = "" if self.negative_prompt is None else self.negative_prompt
        single = isinstance(negative, str)  # encoded once for all prompts
        negatives = broadcast_to_prompts("negative prompts", negative, 1 if single else self.count)
        if self.negative_prompt_embeds is not None:
            negatives = []
        return {"prompt": prompts, "negative_prompt": negatives, "motion_prompt": motions or prompts}
