"""Two-scale classifier-free guidance over image and text, in one batch and with no evaluation that cancels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat


class Case(NamedTuple):
    """One evaluation of the denoiser: which conditions it sees, and its factor in the guided prediction."""

    image: bool
    text: bool
    factor: float


@dataclass(frozen=True)
class Guidance:
    """`pred = p(0,0) + s_img (p(img,0) - p(0,0)) + s_txt (p(img,txt) - p(img,0))`.

    The form is that of InstructPix2Pix (arXiv 2211.09800, eq. 3). Sorted by evaluation the factors are `1 - s_img`,
    `s_img - s_txt` and `s_txt`; a case with factor zero is not evaluated: equal scales need two evaluations, both
    scales 1 need one.
    """

    text: float
    image: float

    @property
    def cases(self) -> tuple[Case, ...]:
        """The evaluations that are needed, at most three; their factors sum to one."""
        factors = (
            Case(False, False, 1 - self.image),
            Case(True, False, self.image - self.text),
            Case(True, True, self.text),
        )
        return tuple(case for case in factors if case.factor)

    def __call__(
        self, denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], z_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The guided prediction at `z_t` (b ...) and `t` (scalar), by one call of the denoiser.

        Args:
            denoiser: takes `t` and `(k b) ...` latents: for each of the k cases, as `cases` orders them, all clips.
        """
        cases = self.cases
        prediction = denoiser(repeat(z_t, "b ... -> (k b) ...", k=len(cases)), t)
        if len(cases) == 1:
            return prediction
        factors = torch.tensor([case.factor for case in cases]).to(prediction)
        return einsum(factors, rearrange(prediction, "(k b) ... -> k b ...", k=len(cases)), "k, k ... -> ...")
