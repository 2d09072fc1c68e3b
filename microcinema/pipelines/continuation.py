"""Videos of several clips: the last frame of each is the key frame of the next."""

from collections.abc import Sequence

import torch

from microcinema.data.keyframe_index import keyframe_index
from microcinema.utils.errors import UserError


def check_continues(num_segments: int, num_frames: int, keyframe_position: str | int) -> None:
    """Refuses what cannot be continued.

    Raises:
        UserError: no clip, clips of one frame, or a model whose key frame is not the first frame of a clip.
    """
    if num_segments < 1:
        raise UserError(f"num_segments is {num_segments}; use a number >= 1")
    if num_segments == 1:
        return
    if num_frames < 2:
        raise UserError(f"num_frames is {num_frames}; a clip that the next one continues needs at least 2")
    if keyframe_index(keyframe_position, num_frames) != 0:
        raise UserError(
            f"num_segments is {num_segments}, but this model's key frame is not the first frame of a clip (keyframe_position="
            f"{keyframe_position}), so no clip can begin where another ends; use num_segments=1, or a model with keyframe_position=first"
        )


def join(clips: Sequence[torch.Tensor]) -> torch.Tensor:
    """One video (b, n (f - 1) + 1, ...) of n clips (b, f, ...); a first frame that repeats the last one before it is left out."""
    return torch.cat([clips[0], *(clip[:, 1:] for clip in clips[1:])], dim=1)


def describe(num_segments: int, num_frames: int) -> str:
    """What is done, for who asked for it."""
    return (
        f"{num_segments} clips of {num_frames} frames are made one after the other, each from the last frame of the one before, as "
        f"{num_segments * (num_frames - 1) + 1} frames; no clip sees further back than that frame, and errors add up"
    )
