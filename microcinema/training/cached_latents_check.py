"""Fingerprint of cached latents, by which training rejects those of another VAE, encoder or data set."""

from typing import Any

import torch
from torch import nn

from microcinema.data.latents import EncodedClips
from microcinema.data.source import ClipSource
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.utils.errors import UserError
from microcinema.utils.fingerprint import canonical, differences
from microcinema.utils.hashing import hash_json, hash_weights

CACHED_PARTS = ("text", "motion_tokens", "image_tokens", "keyframe", "flow")
"""What can be cached beside the latents."""


def fingerprint(pipeline: ImageToVideoPipeline, dataset: ClipSource, flow_model: str | None) -> dict[str, Any]:
    """What determines each input of a run: of `vae`, `clips` and those of `CACHED_PARTS` that the model uses."""
    keyframe_position = 0 if pipeline.keyframe_position == "first" else pipeline.keyframe_position
    vae = pipeline.vae
    parts: dict[str, Any] = {
        "vae": {"sha256": _sha256(vae, vae.config.scaling_factor, vae.config.get("shift_factor"))},
        "clips": dataset.fingerprint(),
        "text": {
            "sha256": _sha256(pipeline.text_encoder, *_tokenizer_settings(pipeline.tokenizer)),
            "of": "description" if pipeline.uses_motion_caption else "caption",
        },
    }
    if pipeline.text_encoder_2 is not None:
        zeros = pipeline.config["force_zeros_for_empty_prompt"]
        second = _sha256(pipeline.text_encoder_2, *_tokenizer_settings(pipeline.tokenizer_2), zeros)
        parts["text"]["second_sha256"] = second
    if pipeline.uses_motion_caption:
        parts["motion_tokens"] = {
            "sha256": _sha256(pipeline.motion_encoder, *_tokenizer_settings(pipeline.motion_tokenizer)),
            "num_motion_tokens": pipeline.config["num_motion_tokens"],
        }
    if pipeline.image_encoder is not None:
        colors = pipeline.config["image_mean"], pipeline.config["image_std"]
        parts["image_tokens"] = {
            "sha256": _sha256(pipeline.image_encoder, *colors),
            "keyframe_position": keyframe_position,
        }
    if pipeline.uses_image_conditioning:
        parts["keyframe"] = {"keyframe_position": keyframe_position}
    if flow_model is not None:
        parts["flow"] = {"teacher": flow_model}
    return canonical(parts)


def check(clips: EncodedClips, pipeline: ImageToVideoPipeline, flow_model: str | None) -> None:
    """Refuses cached latents that do not fit a run (UserError); a part that can be computed from cached ones may be missing."""
    expected, cached = fingerprint(pipeline, clips.dataset, flow_model), clips.contents
    if changes := differences(expected, cached, common_only=True):
        advice = "make others with `microcinema prepare latents` and the keys of this run, or set cached_latents=null"
        raise UserError(f"latents '{clips.folder}' do not match this run: {', '.join(changes)}; {advice}")
    if pipeline.unet.options.motion_score and clips.motion_scores is None:
        fault = f"latents '{clips.folder}' come without motion scores, which this model needs"
        raise UserError(f"{fault}; run `microcinema prepare latents` again with the keys of this run, which adds them")
    missing = {"flow", "keyframe"} & (expected.keys() - cached.keys())
    if "image_tokens" in cached and not pipeline.uses_keyframe_pixels:
        missing.discard("keyframe")
    if missing:
        fault = f"latents '{clips.folder}' come without {' and '.join(sorted(missing))}, which this model needs"
        raise UserError(f"{fault}; make others with cached_parts=[{', '.join(CACHED_PARTS)}]")


def _sha256(network: nn.Module, *settings: Any) -> str:
    # In float32, so that the dtype in which weights are loaded does not count as another network.
    return hash_json([hash_weights(network, torch.float32), *settings])


def _tokenizer_settings(tokenizer: Any) -> tuple[Any, ...]:
    return sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, str(tokenizer.special_tokens_map)
