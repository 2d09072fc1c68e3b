"""What decides the contents of encoded clips, so that training refuses those that were made by something else."""

from typing import Any

import torch
from torch import nn

from microcinema.data.latents import EncodedClips
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.utils.errors import UserError
from microcinema.utils.fingerprint import differences
from microcinema.utils.hashing import canonical, hash_json, hash_weights

KEPT = ("text", "motion_tokens", "image_tokens", "keyframe", "flow")
"""What can be kept beside the latents."""


def fingerprint(pipeline: ImageToVideoPipeline, dataset: Any, flow_model: str | None) -> dict[str, Any]:
    """What a run reads of clips, by part (`vae`, `clips` and some of `KEPT`), with what decides each.

    Args:
        pipeline: of the run, with its encoders.
        dataset: of clips, with a `fingerprint()` of its own.
        flow_model: of PredictNet; None: there is none.
    """
    reference = 0 if pipeline.keyframe_position == "first" else pipeline.keyframe_position
    vae = pipeline.vae
    parts: dict[str, Any] = {
        "vae": {"sha256": _sha256(vae, vae.config.scaling_factor, vae.config.get("shift_factor"))},
        "clips": dataset.fingerprint(),
        "text": {
            "sha256": _sha256(pipeline.text_encoder, *_about(pipeline.tokenizer)),
            "of": "description" if pipeline.uses_motion_caption else "caption",
        },
    }
    if pipeline.uses_motion_caption:
        parts["motion_tokens"] = {
            "sha256": _sha256(pipeline.motion_encoder, *_about(pipeline.motion_tokenizer)),
            "num_motion_tokens": pipeline.config["num_motion_tokens"],
        }
    if pipeline.image_encoder is not None:
        colours = pipeline.config["image_mean"], pipeline.config["image_std"]
        parts["image_tokens"] = {"sha256": _sha256(pipeline.image_encoder, *colours), "keyframe_position": reference}
    if pipeline.uses_image_conditioning:
        parts["keyframe"] = {"keyframe_position": reference}
    if flow_model is not None:
        parts["flow"] = {"teacher": flow_model}
    return canonical(parts)


def check(clips: EncodedClips, pipeline: ImageToVideoPipeline, flow_model: str | None) -> None:
    """Compares encoded clips with what a run reads. What is not kept, and can be made of what is, is no difference.

    Raises:
        UserError: names what differs, or what is missing.
    """
    wanted, held = fingerprint(pipeline, clips.dataset, flow_model), clips.contents
    if differ := differences(wanted, held, common_only=True):
        raise UserError(
            f"latents '{clips.folder}' do not match this run: {', '.join(differ)}; "
            "make others with `microcinema prepare latents` and the keys of this run, or set cached_latents=null"
        )
    lacking = {"flow"} & (set(wanted) - set(held))
    if (
        "keyframe" in wanted
        and "keyframe" not in held
        and (pipeline.uses_keyframe_pixels or "image_tokens" not in held)
    ):
        lacking.add("keyframe")
    if lacking:
        what = " and ".join(sorted(lacking))
        raise UserError(
            f"latents '{clips.folder}' come without {what}, which this model learns from; make others with cached_parts=[{', '.join(KEPT)}]"
        )


def _sha256(network: nn.Module, *settings: Any) -> str:
    # In float32, so that the dtype in which weights are loaded does not count as another network.
    return hash_json([hash_weights(network, torch.float32), *settings])


def _about(tokenizer: Any) -> tuple[Any, ...]:
    return sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, str(tokenizer.special_tokens_map)
