"""Videos longer than a model was trained on: one long latent, denoised in windows of the trained length."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from microcinema.utils.errors import UserError


@dataclass(frozen=True)
class Windows:
    """Windows over the frames of a video, evenly placed; where they overlap, predictions are averaged.

    All windows read the same latents and the result is one prediction for the whole video, so that neighbours agree from the
    first step on (temporal co-denoising, arXiv 2305.18264).

    Args:
        frames: of the video.
        length: of a window: the frames that the model was trained with. A video that is not longer is one window.
        overlap: frames that neighbours share, or a few more, since the last window ends where the video does; None: half of
            `length`.

    Raises:
        UserError: an overlap below zero, or of a whole window.
    """

    frames: int
    length: int
    overlap: int | None = None

    def __post_init__(self) -> None:
        if self.overlap is None:
            object.__setattr__(self, "overlap", self.length // 2)
        elif not 0 <= self.overlap < self.length:
            raise UserError(
                f"window_overlap is {self.overlap}; windows have {self.length} frames, so use 0 to {self.length - 1}"
            )

    @property
    def places(self) -> list[slice]:
        """The frames of each window."""
        assert self.overlap is not None
        left = max(0, self.frames - self.length)  # how far the last window is from the first
        moves = math.ceil(left / (self.length - self.overlap))
        starts = [move * left // moves for move in range(moves + 1)] if moves else [0]
        return [slice(start, start + min(self.length, self.frames)) for start in starts]

    def average(self, predict: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor) -> torch.Tensor:
        """Predictions of all windows as one: at every frame the mean of those of the windows that it lies in.

        Args:
            predict: maps frames (b, length, ...) to as many.
            z: (b, f, ...).
        """
        places = self.places
        if len(places) == 1:
            return predict(z)
        total, count = torch.zeros_like(z), torch.zeros(self.frames, device=z.device)
        for place in places:
            total[:, place] += predict(z[:, place])
            count[place] += 1
        return total / count.view(-1, *[1] * (z.ndim - 2))

    def __str__(self) -> str:
        return (
            f"{self.frames} frames, more than the {self.length} that the model was trained with, are made in "
            f"{len(self.places)} windows of {self.length} that overlap by {self.overlap} or more and are averaged there; "
            "every window is held to the same key frame"
        )
