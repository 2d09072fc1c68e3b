"""Videos longer than a model was trained on: in windows over one long latent, or as segments that continue one another.

Shapes: b videos, f frames; further dimensions are arbitrary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microcinema.data.keyframe_index import keyframe_index
from microcinema.utils.errors import UserError


@dataclass(frozen=True)
class Windows:
    """Evenly spaced windows over the frames of a video; where they overlap, predictions are averaged.

    All windows read the same latents, and their predictions become one for the whole video, so that neighbors agree from the
    first step on (temporal co-denoising, arXiv 2305.18264). A UserError if the overlap is negative, or not smaller than a window.
    """

    frames: int  # of the video
    length: int  # of a window: the frames that the model was trained with; a video no longer than this is one window
    overlap: int | None = None  # least number of frames that neighbors share; None: half of `length`

    def __post_init__(self) -> None:
        if self.overlap is None:
            object.__setattr__(self, "overlap", self.length // 2)
        elif not 0 <= self.overlap < self.length:
            raise UserError(f"window_overlap is {self.overlap}, of {self.length} frames; use 0 to {self.length - 1}")

    @property
    def slices(self) -> list[slice]:
        """The frames of each window."""
        assert self.overlap is not None
        span = max(0, self.frames - self.length)  # from the first window's start to the last one's
        steps = math.ceil(span / (self.length - self.overlap))
        starts = [step * span // steps for step in range(steps + 1)] if steps else [0]
        return [slice(start, start + min(self.length, self.frames)) for start in starts]

    def keyframe_index(self, keyframe_position: str | int) -> int:
        """Index of the key frame in the whole video: every window has it at its own place, and of these this is the one nearest to
        that of the whole video. A UserError if there is none."""
        wanted = keyframe_index(keyframe_position, self.frames)
        own = (w.start + keyframe_index(keyframe_position, w.stop - w.start) for w in self.slices)
        return min(own, key=lambda index: abs(index - wanted))

    def average(self, predict: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """The prediction for a whole video `b f ...`: at every frame, the mean of `predict` over the windows that contain it."""
        slices = self.slices
        if len(slices) == 1:
            return predict(z)
        total, count = torch.zeros_like(z), torch.zeros(self.frames, device=z.device)
        for window in slices:
            total[:, window] += predict(z[:, window])
            count[window] += 1
        return total / count.view(-1, *[1] * (z.ndim - 2))

    def __str__(self) -> str:
        return (
            f"{self.frames} frames are more than the {self.length} that the model was trained with; they are sampled in "
            f"{len(self.slices)} windows of {self.length} frames, which overlap by {self.overlap} or more and share the key frame"
        )


def check_continuation(num_segments: int, num_frames: int, keyframe_position: str | int) -> None:
    """Refuses several segments of one frame, and several of a model whose key frame is not the first frame of a clip."""
    if num_segments == 1:
        return
    if num_frames < 2:
        raise UserError(f"num_frames is {num_frames}; with several segments each needs at least 2")
    if keyframe_index(keyframe_position, num_frames) != 0:
        fault = f"num_segments is {num_segments}, but this model's key frame is not the first (keyframe_position={keyframe_position})"
        raise UserError(f"{fault}, so that no segment can continue another; use num_segments=1, or another model")


def notices(windows: Windows, num_segments: int) -> list[str]:
    """What the user of several windows or segments should know."""
    told = [str(windows)] if len(windows.slices) > 1 else []
    if num_segments > 1:
        told.append(
            f"{num_segments} segments of {windows.frames} frames are sampled one after another, each from the last frame of the one before "
            f"({num_segments * (windows.frames - 1) + 1} frames in all); a segment sees nothing of the earlier ones but that frame, so "
            "errors accumulate"
        )
    return told
