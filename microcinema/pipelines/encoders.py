"""The frozen encoders that Factorized-Dreamer adds (arXiv 2408.10119): CLIP reads the key frame, T5 the motion caption."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection, T5EncoderModel, T5TokenizerFast

from microcinema.pipelines.base_model import load_component, load_index, resolve_snapshot
from microcinema.utils.errors import UserError

IMAGE_ENCODER, MOTION_ENCODER, MOTION_TOKENIZER = "image_encoder", "motion_encoder", "motion_tokenizer"
_PROCESSOR = "preprocessor_config.json"


def load_image_encoder(
    name: str | None,
    base: str,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
) -> dict[str, Any]:
    """A CLIP's image encoder, and the mean and deviation of the colours that it was trained with.

    Args:
        name: a folder or hub repository in the layout of transformers; None: the one among the base's files.
        base: the text-to-image model, with the other arguments of `load_base`.

    Returns:
        `image_encoder`, `image_mean` and `image_std`, by these names.

    Raises:
        UserError: there is none.
    """
    if name is None:
        components = [IMAGE_ENCODER] if weights else []
        folder = Path(resolve_snapshot(base, components, revision, variant))
        if (load_index(str(folder)).get(IMAGE_ENCODER) or [None])[0] is None:
            raise UserError(
                f"the base '{base}' has no image encoder, which model.adapter reads; name one, such as "
                "model.image_encoder=openai/clip-vit-large-patch14, or set model.adapter=null"
            )
        network, settings = folder / IMAGE_ENCODER, folder / "feature_extractor" / _PROCESSOR
    else:
        network = Path(resolve_snapshot(name, ["."] if weights else []))
        variant, settings = None, network / _PROCESSOR
    try:
        said = json.loads(settings.read_text(encoding="utf-8"))
        colours = {key: [float(value) for value in said[key]] for key in ("image_mean", "image_std")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{settings}' does not give image_mean and image_std ({error}); complete the model") from None
    # The rest of a whole CLIP is not missed.
    others = ("text_model.", "text_projection.", "logit_scale")
    encoder = load_component(network, CLIPVisionModelWithProjection, variant, dtype, weights, others)
    return {IMAGE_ENCODER: encoder, **colours}


def load_motion_encoder(name: str, dtype: torch.dtype = torch.float32, weights: bool = True) -> dict[str, Any]:
    """A T5's encoder and tokenizer.

    Args:
        name: an embedded model, a folder or a hub repository (such as `google/flan-t5-base`) in the layout of transformers.

    Returns:
        `motion_encoder` and `motion_tokenizer`, by these names.

    Raises:
        UserError: there is no such model, or it is no T5.
    """
    folder = Path(resolve_snapshot(name, ["."] if weights else []))
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of the motion encoder '{name}' ({error}); name a T5") from None
    if kind != "t5":
        raise UserError(f"the motion encoder '{name}' is a {kind}; name a T5, such as google/flan-t5-base")
    others = ("decoder.", "lm_head.")
    return {
        MOTION_ENCODER: load_component(folder, T5EncoderModel, None, dtype, weights, others),
        MOTION_TOKENIZER: load_component(folder, T5TokenizerFast),
    }


def read_image(
    encoder: CLIPVisionModelWithProjection, pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """The encoder's tokens (b, p, e), one for the whole and one for each patch, of images (b, 3, H, W) in [-1, 1].

    An image is resized to the encoder's square whatever its shape: nothing of the key frame is cut off.
    """
    size = encoder.config.image_size
    resized = functional.interpolate(
        pixels.float(), (size, size), mode="bicubic", antialias=True, align_corners=False
    ).clamp(-1, 1)
    shift, scale = (torch.tensor(values, device=pixels.device).reshape(3, 1, 1) for values in (mean, std))
    return encoder(((resized + 1) / 2 - shift).div(scale).to(encoder.dtype)).last_hidden_state


def read_motion(
    encoder: T5EncoderModel,
    tokenizer: T5TokenizerFast,
    captions: list[str],
    num_tokens: int,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The encoder's tokens (b, num_tokens, e) of motion captions, cut to that length; padding is zero.

    Args:
        device: that the encoder runs on; None: where it is. With offloading that is elsewhere until it is called.
    """
    tokens = tokenizer(captions, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt")
    tokens = tokens.to(device or encoder.device)
    states = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask[..., None].to(states.dtype)
