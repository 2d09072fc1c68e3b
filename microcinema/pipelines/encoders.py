"""The frozen encoders of captions and key frames: CLIP text as in Stable Diffusion and SDXL, and those that Factorized-Dreamer adds.

Factorized-Dreamer (arXiv 2408.10119) adds CLIP's image encoder, whose tokens the adapter reads, and T5 for the motion caption.

Shapes: b samples, n text tokens, d text width, p patch tokens, k motion tokens, e width of the encoder, H W pixels.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer, CLIPVisionModelWithProjection, T5EncoderModel, T5TokenizerFast

from microcinema.pipelines.loading import component_class, load_component, load_index, resolve_snapshot
from microcinema.utils.device import to_device
from microcinema.utils.errors import UserError, user_errors

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
    """A CLIP image encoder, with the mean and standard deviation by which it expects colors to be normalized.

    Args:
        name: a folder or hub repository in the layout of transformers; None: the image encoder of the base.
        base: the text-to-image model; this and the other arguments as in `load_base`.

    Returns:
        `image_encoder`, `image_mean` and `image_std`, by these names.
    """
    if name is None:
        folder = Path(resolve_snapshot(base, [IMAGE_ENCODER] if weights else [], revision, variant))
        if component_class(load_index(str(folder)), IMAGE_ENCODER) is None:
            advice = "name one, such as model.image_encoder=openai/clip-vit-large-patch14, or set model.adapter=null"
            raise UserError(f"the base '{base}' has no image encoder, which model.adapter needs; {advice}")
        network, processor = folder / IMAGE_ENCODER, folder / "feature_extractor" / _PROCESSOR
    else:
        network = Path(resolve_snapshot(name, ["."] if weights else []))
        variant, processor = None, network / _PROCESSOR
    with user_errors(f"'{processor}' has no image_mean and image_std ({{reason}}); complete the model"):
        config = json.loads(processor.read_text(encoding="utf-8"))
        colors = {key: [float(value) for value in config[key]] for key in ("image_mean", "image_std")}
    text_side = ("text_model.", "text_projection.", "logit_scale")  # in the files of a whole CLIP
    encoder = load_component(network, CLIPVisionModelWithProjection, variant, dtype, weights, ignore_prefixes=text_side)
    return {IMAGE_ENCODER: encoder, **colors}


def load_motion_encoder(name: str, dtype: torch.dtype = torch.float32, weights: bool = True) -> dict[str, Any]:
    """`motion_encoder` and `motion_tokenizer`, by these names, of a T5 in the layout of transformers (as `google/flan-t5-base`); a UserError
    if there is no such model, or it is not a T5."""
    folder = Path(resolve_snapshot(name, ["."] if weights else []))
    with user_errors(f"cannot read the config of the motion encoder '{name}' ({{reason}}); name a T5"):
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != "t5":
        raise UserError(f"the motion encoder '{name}' is a {model_type}; name a T5, such as google/flan-t5-base")
    decoder = ("decoder.", "lm_head.")
    return {
        MOTION_ENCODER: load_component(folder, T5EncoderModel, None, dtype, weights, ignore_prefixes=decoder),
        MOTION_TOKENIZER: load_component(folder, T5TokenizerFast),
    }


def encode_text(
    components: Mapping[str, Any], texts: list[str], zeros_for_empty: bool = False, device: torch.device | None = None
) -> Tensor:
    """Text tokens `b n d`, padded or cut to the tokenizer's length n, as in Stable Diffusion.

    With two encoders `b n+1 d`, as in SDXL (arXiv 2307.01952, section 2.1): the last states but one of both, side by side in d = d1 + d2; the
    last row is the second's pooled text, padded with zeros. One tensor, so that captions are cached, dropped and guided as a whole. With
    `zeros_for_empty` that of an empty text is zero throughout.

    `device` is where to compute; None: where the encoders are. With offloading that is elsewhere until they are called.
    """
    names = [end for end in ("", "_2") if components[f"text_encoder{end}"] is not None]
    pairs = [(components[f"tokenizer{end}"], components[f"text_encoder{end}"]) for end in names]
    outputs = [
        encoder(_token_ids(tokenizer, texts, device or encoder.device), output_hidden_states=len(pairs) > 1)
        for tokenizer, encoder in pairs
    ]
    if len(outputs) == 1:
        return outputs[0][0]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = functional.pad(outputs[1][0], (0, tokens.shape[-1] - outputs[1][0].shape[-1]))
    embeddings = torch.cat([tokens, pooled[:, None]], dim=1)
    kept = to_device(torch.tensor([bool(text) or not zeros_for_empty for text in texts]), embeddings.device)
    return embeddings * kept[:, None, None]


def _token_ids(tokenizer: CLIPTokenizer, texts: list[str], device: torch.device) -> Tensor:
    length = tokenizer.model_max_length
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return to_device(tokens.input_ids, device)


def unread_texts(lengths: Mapping[str, tuple[Any, int]], texts: Mapping[str, str]) -> dict[str, str]:
    """The ends of texts that are longer than their encoders read, by name; a length is a tokenizer and its number of tokens."""
    tokens = {name: tokenizer(texts[name], verbose=False).input_ids for name, (tokenizer, _) in lengths.items()}
    longer = [(name, *lengths[name]) for name in lengths if len(tokens[name]) > lengths[name][1]]
    return {name: tokenizer.decode(tokens[name][length - 1 : -1]).strip() for name, tokenizer, length in longer}


def encode_motion_tokens(
    encoder: T5EncoderModel,
    tokenizer: T5TokenizerFast,
    captions: list[str],
    num_tokens: int,
    device: torch.device | None = None,
) -> Tensor:
    """Motion tokens `b k e` of motion captions, padded with zeros or cut to k = `num_tokens`; `device` as in `encode_text`."""
    tokens = tokenizer(captions, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt")
    ids, mask = (to_device(each, device or encoder.device) for each in (tokens.input_ids, tokens.attention_mask))
    # As what is added to the scores: of ones and zeros transformers would read whether any is zero, and wait for the device.
    added = torch.where(mask[:, None, None].bool(), 0.0, torch.finfo(encoder.dtype).min).to(encoder.dtype)
    return encoder(input_ids=ids, attention_mask=added).last_hidden_state * mask[..., None]


def encode_image_tokens(
    encoder: CLIPVisionModelWithProjection, pixels: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Image tokens `b p e`, the class token and one for each patch, of images `b 3 H W` in [-1, 1].

    An image is resized to the encoder's square whatever its shape, so that nothing is cropped.
    """
    size = encoder.config.image_size
    resized = functional.interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    shift, scale = (to_device(torch.tensor(values), pixels.device).reshape(3, 1, 1) for values in (mean, std))
    return encoder(((resized + 1) / 2 - shift).div(scale).to(encoder.dtype)).last_hidden_state
