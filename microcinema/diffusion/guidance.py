"""Classifier-free guidance with separate scales for key frame and text, in one batch and without terms that cancel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat


class GuidanceTerm(NamedTuple):
    """One evaluation of the denoiser: which conditions it sees, and its factor in the guided prediction."""

    image: bool
    text: bool
    factor: float


@dataclass(frozen=True)
class CFG:
    """`pred = p(0,0) + s_img (p(img,0) - p(0,0)) + s_txt (p(img,txt) - p(img,0))`, InstructPix2Pix (arXiv 2211.09800, eq. 3).

    Sorted by evaluation, the factors are `1 - s_img`, `s_img - s_txt` and `s_txt`; a term with factor zero is not
    evaluated: equal scales need two evaluations, both scales 1 need one.
    """

    text: float  # s_txt
    image: float  # s_img

    @property
    def terms(self) -> tuple[GuidanceTerm, ...]:
        """The evaluations that are needed, at most three; their factors sum to one."""
        terms = (
            GuidanceTerm(False, False, 1 - self.image),
            GuidanceTerm(True, False, self.image - self.text),
            GuidanceTerm(True, True, self.text),
        )
        return tuple(term for term in terms if term.factor)

    def __call__(
        self, denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], z_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The guided prediction at `z_t` (b ...) and `t` (scalar), by one call of the denoiser on `(k b) ...`, k terms of b clips."""
        terms = self.terms
        prediction = denoiser(repeat(z_t, "b ... -> (k b) ...", k=len(terms)), t)
        if len(terms) == 1:
            return prediction
        factors = torch.tensor([term.factor for term in terms]).to(prediction)
        return einsum(factors, rearrange(prediction, "(k b) ... -> k b ...", k=len(terms)), "k, k ... -> ...")
