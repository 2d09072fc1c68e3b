"""Classifier-free guidance with separate scales for key frame and text, in one batch and without terms that cancel; and its variants."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor


class GuidanceTerm(NamedTuple):
    """One evaluation of the denoiser: which conditions it sees, and its factor in the guided prediction."""

    image: bool
    text: bool
    factor: float


@dataclass(frozen=True)
class Guidance:
    """`pred = p(0,0) + s_img (p(img,0) - p(0,0)) + s_txt (p(img,txt) - p(img,0))`, InstructPix2Pix (arXiv 2211.09800, eq. 3).

    Sorted by evaluation, the factors are `1 - s_img`, `s_img - s_txt` and `s_txt`; a term with factor zero is not
    evaluated: equal scales need two evaluations, both scales 1 need one. The further settings change nothing by default; they
    act on the *update* `pred - p(img,txt)`.

    Args:
        text, image: s_txt and s_img.
        interval: guided are the steps i of n with `interval[0] <= i / n < interval[1]`, counted from noise; others take p(img,txt), by one
            evaluation. After arXiv 2404.07724, which states noise levels; that it is a share of the steps is ours.
        reuse: of so many guided steps the first evaluates all terms, and the others add its update to p(img,txt). After FasterCache
            (arXiv 2410.19355); that the update is added as it is, without weights by frequency, is ours.
        rescale: phi of arXiv 2305.08891, eq. 15 and 16: how far the deviation of a clip's prediction is brought to that of p(img,txt).
        apg_eta, apg_norm_threshold, apg_momentum: adaptive projected guidance (arXiv 2410.02416, algorithm 1): factor of the part of
            the update that is parallel to the predicted clip, largest norm of the update per unit of guidance, and weight of its
            average over earlier steps (negative in the paper), all of a clip's z0. With two scales the unit is the larger one's, ours.
    """

    text: float
    image: float
    interval: tuple[float, float] = (0.0, 1.0)
    reuse: int = 1
    rescale: float = 0.0
    apg_eta: float = 1.0
    apg_norm_threshold: float | None = None
    apg_momentum: float = 0.0

    @property
    def terms(self) -> tuple[GuidanceTerm, ...]:
        """The evaluations of a guided step, at most three; their factors sum to one. With further settings p(img,txt) is the last."""
        terms = (
            GuidanceTerm(False, False, 1 - self.image),
            GuidanceTerm(True, False, self.image - self.text),
            GuidanceTerm(True, True, self.text),
        )
        is_plain = self == Guidance(self.text, self.image)
        return tuple(term for term in terms if term.factor or (term.text and not is_plain))


class GuidedDenoiser:
    """Guided predictions along the steps of one sampling run.

    Args:
        denoiser: `(z_t, t) -> prediction`, of `(k b) ...`: k terms of b clips, or of the last term alone.
        num_steps: calls of the run.
    """

    def __init__(self, guidance: Guidance, denoiser: Callable[[Tensor, Tensor], Tensor], num_steps: int):
        self.guidance, self.denoiser, self.num_steps = guidance, denoiser, num_steps
        self.step = self.guided_steps = 0
        self.update: Any = None
        self.average: Any = 0.0

    def __call__(self, z_t: Tensor, t: Tensor, z0_gains: tuple[Any, Any] = (0.0, 1.0)) -> Tensor:
        """The guided prediction at `z_t` (b ...) and `t` (scalar), by one call of the denoiser.

        Args:
            z0_gains: of z_t and of the prediction in z0, see `predicted_z0_gains`.
        """
        guidance, terms, position = self.guidance, self.guidance.terms, self.step / self.num_steps
        is_guided = len(terms) > 1 and guidance.interval[0] <= position < guidance.interval[1]
        self.step += 1
        if not is_guided:
            return self.denoiser(z_t, t)
        is_new = self.guided_steps % guidance.reuse == 0
        self.guided_steps += 1
        if is_new:
            predictions = self.denoiser(repeat(z_t, "b ... -> (k b) ...", k=len(terms)), t)
            predictions = rearrange(predictions, "(k b) ... -> k b ...", k=len(terms))
            factors = torch.tensor([term.factor for term in terms]).to(predictions)
            plain, guided = predictions[-1], einsum(factors, predictions, "k, k ... -> ...")
            if (guidance.apg_eta, guidance.apg_norm_threshold, guidance.apg_momentum) != (1.0, None, 0.0):
                guided = plain + self._projected(guided - plain, z0_gains[0] * z_t + z0_gains[1] * plain, z0_gains[1])
            if guidance.reuse > 1:
                self.update = guided - plain
        else:
            plain = self.denoiser(z_t, t)
            guided = plain + self.update
        if guidance.rescale:
            ratio = _per_clip(torch.std, plain) / _per_clip(torch.std, guided)
            guided = (guidance.rescale * ratio + 1 - guidance.rescale) * guided
        return guided

    def _projected(self, update: Tensor, z0: Tensor, gain: Any) -> Tensor:
        """The update of adaptive projected guidance, for the plain prediction's z0; `gain` is that of predictions in z0."""
        guidance = self.guidance
        unit = max(abs(guidance.text - 1), abs(guidance.image - 1))
        self.average = delta = gain * update / unit + guidance.apg_momentum * self.average
        if guidance.apg_norm_threshold is not None:
            delta = delta * (guidance.apg_norm_threshold / _per_clip(torch.linalg.vector_norm, delta)).clamp(max=1)
        parallel = _per_clip(torch.sum, delta * z0) / _per_clip(torch.sum, z0 * z0) * z0
        return unit * (delta + (guidance.apg_eta - 1) * parallel) / gain


def _per_clip(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """A reduction of each clip of `b ...`, shaped to multiply it."""
    return function(x, dim=tuple(range(1, x.ndim)), keepdim=True)
