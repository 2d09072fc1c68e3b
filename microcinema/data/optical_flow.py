"""Optical flow between neighbouring frames, from a teacher, and its passage to the latent grid: what PredictNet learns from."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
import torch
from einops import rearrange, reduce

from microcinema.utils.errors import UserError

FLOW_MODELS = ("dis", "raft")


@dataclass(frozen=True)
class Flow:
    """Forward optical flow of clips and where it can be trusted.

    Attributes:
        vectors: float32 (..., f-1, 2, h, w): (dx, dy) from each frame to the next, in places of its own grid.
        valid: bool (..., f-1, h, w).
    """

    vectors: torch.Tensor
    valid: torch.Tensor


def estimate(teacher: str, frames: np.ndarray) -> Flow:
    """Flow of a clip by `dis` or `raft`, in pixels; valid where the way there and back again ends where it began.

    Args:
        frames: uint8 (f, h, w, 3).

    Raises:
        UserError: no such teacher, or its library or weights are missing.
    """
    method = _method(teacher)
    pairs = list(pairwise(frames))
    forward = np.stack([method(a, b) for a, b in pairs]) if pairs else np.zeros((0, *frames.shape[1:3], 2), np.float32)
    backward = np.stack([method(b, a) for a, b in pairs]) if pairs else forward
    return Flow(_channels_first(forward), torch.from_numpy(consistent(forward, backward)))


def exact(flow: np.ndarray) -> Flow:
    """A flow (f-1, h, w, 2) that is known, valid everywhere."""
    return Flow(_channels_first(flow), torch.ones(flow.shape[:3], dtype=torch.bool))


def consistent(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Where flow there and flow back cancel, bool (f-1, h, w): the occlusion test of arXiv 1711.07837, equation 1.

        |F(x) + B(x + F(x))|^2 < 0.01 (|F(x)|^2 + |B(x + F(x))|^2) + 0.5

    Places that flow out of the picture are not valid.

    Args:
        forward, backward: (f-1, h, w, 2), pixels.
    """
    height, width = forward.shape[1:3]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    valid = np.zeros(forward.shape[:3], bool)
    for there, back, out in zip(forward, backward, valid, strict=True):
        to_x, to_y = x + there[..., 0], y + there[..., 1]
        returned = cv2.remap(back.astype(np.float32), to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        gap = ((there + returned) ** 2).sum(-1)
        inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
        out[:] = inside & (gap < 0.01 * ((there**2).sum(-1) + (returned**2).sum(-1)) + 0.5)
    return valid


def to_latent_grid(flow: Flow, factor: int) -> Flow:
    """The flow on a grid that is `factor` times coarser: means over the valid pixels of each place, in places of that grid.

    A vector of `factor` pixels becomes one of length 1. A place is valid if at least half of its pixels are.

    Raises:
        UserError: the size does not divide by the factor.
    """
    height, width = flow.valid.shape[-2:]
    if height % factor or width % factor:
        raise UserError(
            f"flow of {height}x{width} does not divide by {factor}; use the size that the latents were made at"
        )
    share = reduce(flow.valid.float(), "... (h p) (w q) -> ... h w", "mean", p=factor, q=factor)
    masked = torch.where(flow.valid.unsqueeze(-3), flow.vectors, torch.zeros_like(flow.vectors))
    mean = reduce(masked, "... (h p) (w q) -> ... h w", "mean", p=factor, q=factor)
    return Flow(mean / share.clamp(min=1e-6).unsqueeze(-3) / factor, share >= 0.5)


def _channels_first(flow: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rearrange(flow.astype(np.float32), "f h w c -> f c h w")))


@functools.cache
def _method(teacher: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    if teacher == "dis":
        dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        # Its default leaves motion finer than four pixels out, which is all the motion that small pictures have.
        dis.setFinestScale(0)

        def by_dis(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            first, second = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (a, b))
            return dis.calc(first, second, None)  # type: ignore[call-overload]

        return by_dis
    if teacher == "raft":
        return _raft()
    raise UserError(f"flow teacher '{teacher}' is unknown; use one of {', '.join(FLOW_MODELS)}")


def _raft() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """RAFT (arXiv 2003.12039) of torchvision, with its own weights, from torchvision's cache or its download."""
    try:
        from torchvision.models.optical_flow import Raft_Large_Weights, raft_large  # type: ignore[import-not-found]
    except (ImportError, RuntimeError):  # the second: built for another torch
        raise UserError("flow teacher 'raft' needs torchvision; pip install 'microcinema[flow]', or use dis") from None
    weights = Raft_Large_Weights.DEFAULT
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = raft_large(weights=weights).eval().to(device)
    prepare = weights.transforms()

    @torch.no_grad()
    def by_raft(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        first, second = prepare(*(rearrange(torch.from_numpy(image.copy()), "h w c -> 1 c h w") for image in (a, b)))
        return rearrange(network(first.to(device), second.to(device))[-1][0], "c h w -> h w c").cpu().numpy()

    return by_raft
