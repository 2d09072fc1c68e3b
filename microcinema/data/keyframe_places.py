"""Key frames at chosen places of a clip, for models with `model.keyframe_places`. Ours.

The network sees every placed key frame where it stands, and between two their blend, of which its prediction has a learned share. All else that needs one key frame for the whole clip (AppearNet, image adapter,
noise prior, ...) gets the *main* one: of the placed ones the nearest to the model's own place, `keyframe_position`.

Shapes: b clips, f frames, c h w latents.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor


def main_keyframe(places: Tensor, own: int) -> Tensor:
    """Index of the main key frame among places, bool `(..., f)`: the one nearest to frame `own`, the earlier of two; `(...)`."""
    distance = (torch.arange(places.shape[-1], device=places.device) - own).abs()
    return torch.where(places, distance, places.shape[-1]).argmin(-1)


def place_keyframes(latents: Tensor, places: Tensor) -> Tensor:
    """What the network sees: the latents `b f c h w` where `places`, bool `(b, f)`, is True, between two of these their mean, weighted by
    nearness, and beyond the outer ones the nearest; and a channel that is 1 at the places and 0 elsewhere, `b f c+1 h w`.

    Every clip has a place. Latents elsewhere are not looked at.
    """
    frame = torch.arange(places.shape[1], device=places.device)
    before = torch.where(places, frame, -1).cummax(1).values
    after = torch.where(places, frame, len(frame)).flip(1).cummin(1).values.flip(1)
    before, after = torch.where(before < 0, after, before), torch.where(after == len(frame), before, after)
    share = rearrange((frame - before) / (after - before).clamp(min=1), "b f -> b f 1 1 1").to(latents.dtype)
    clip = torch.arange(len(latents), device=places.device)[:, None]
    filled = torch.lerp(latents[clip, before], latents[clip, after], share)
    mask = rearrange(places, "b f -> b f 1 1 1").expand_as(filled[:, :, :1])
    return torch.cat([filled, mask.to(latents.dtype)], dim=2)


def draw_places(frames: int, own: int, probability: float, choice: Sequence[str], rng: torch.Generator) -> Tensor:
    """The places of a training clip, bool `(f,)`: frame `own` alone, or with this probability a set of `choice`, all as frequent.

    The sets are those of `config.types.PlaceSet`; `random` are one to four frames.
    """
    random = torch.randperm(frames, generator=rng)[: 1 + int(torch.randint(4, (), generator=rng))].tolist()
    sets = {
        "first": [0],
        "last": [frames - 1],
        "ends": [0, frames - 1],
        "center": [frames // 2],
        "every_second": [*range(0, frames, 2)],
        "every_fourth": [*range(0, frames, 4)],
        "random": random,
    }
    drawn = sets[choice[int(torch.randint(len(choice), (), generator=rng))]]
    places = torch.zeros(frames, dtype=torch.bool)
    places[drawn if torch.rand((), generator=rng) < probability else own] = True
    return places
