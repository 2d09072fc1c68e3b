"""Optical flow between consecutive frames on the latent grid, computed as clips are read: the target of PredictNet."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import torch
from einops import rearrange, reduce

from microcinema.config.instantiate import Component
from microcinema.data.source import ClipSource, ClipWrapper
from microcinema.utils.errors import UserError, user_errors

FLOW_MODELS = ("dis", "raft")


@dataclass(frozen=True)
class Flow:
    """Forward optical flow of clips, and where it is valid."""

    vectors: torch.Tensor  # float32 (..., f-1, 2, h, w): (dx, dy) from each frame to the next, in units of its own grid
    valid: torch.Tensor  # bool (..., f-1, h, w)


class FlowClips(ClipWrapper):
    """The items of a data set of clips with `flow` float32 (f-1, 2, h, w) and `flow_valid` bool (f-1, h, w), on the latent grid.

    RAFT uses the GPU only in the main process: set dataloader_num_workers=0, or better, cache the flow.

    Args:
        flow_model: `dis`, `raft`, or the full name of a class that is constructed from the data set and maps an item to its `Flow` in pixels.
        factor: pixels per unit of the latent grid.

    Raises:
        UserError: an unknown flow model, or one that does not know the flow of this data set.
    """

    def __init__(self, dataset: ClipSource, flow_model: str, factor: int) -> None:
        super().__init__(dataset)
        self.factor = factor
        self.flow_model = flow_model
        self.truth = None if flow_model in FLOW_MODELS else Component(flow_model, {}).build(dataset=dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        flow = estimate(self.flow_model, pixels_of(item)) if self.truth is None else self.truth(item)
        flow = to_latent_grid(flow, self.factor)
        return {**item, "flow": flow.vectors, "flow_valid": flow.valid}


def pixels_of(item: dict[str, Any]) -> np.ndarray:
    """The frames of an item with `video`, uint8 (f, h, w, 3)."""
    return item["video"].permute(0, 2, 3, 1).contiguous().numpy()


def estimate(flow_model: str, frames: np.ndarray) -> Flow:
    """Flow of frames, uint8 (f, h, w, 3), by `dis` or `raft`, in pixels; valid where forward and backward flow cancel. A UserError if the
    model is unknown, or its library is missing."""
    forward, backward = forward_flow(flow_model, frames), forward_flow(flow_model, frames[::-1])[::-1]
    return Flow(_channels_first(forward), torch.from_numpy(consistent(forward, backward)))


def forward_flow(flow_model: str, frames: np.ndarray) -> np.ndarray:
    """Flow (f-1, h, w, 2) from each frame, uint8 (f, h, w, 3), to the next, in pixels; errors are those of `estimate`."""
    method = _method(flow_model)
    steps = [method(a, b) for a, b in pairwise(frames)]
    return np.stack(steps) if steps else np.zeros((0, *frames.shape[1:3], 2), np.float32)


def exact(flow: np.ndarray) -> Flow:
    """A known flow (f-1, h, w, 2), valid everywhere."""
    return Flow(_channels_first(flow), torch.ones(flow.shape[:3], dtype=torch.bool))


def consistent(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Where forward and backward flow cancel, bool (f-1, h, w): the occlusion test of arXiv 1711.07837, equation 1.

        |F(x) + B(x + F(x))|^2 < 0.01 (|F(x)|^2 + |B(x + F(x))|^2) + 0.5

    Flows are (f-1, h, w, 2), in pixels; pixels that leave the frame are not valid.
    """
    height, width = forward.shape[1:3]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    valid = np.zeros(forward.shape[:3], bool)
    for k, (flow, back) in enumerate(zip(forward, backward.astype(np.float32), strict=True)):
        to_x, to_y = x + flow[..., 0], y + flow[..., 1]
        back = cv2.remap(back, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        gap = ((flow + back) ** 2).sum(-1)
        inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
        valid[k] = inside & (gap < 0.01 * ((flow**2).sum(-1) + (back**2).sum(-1)) + 0.5)
    return valid


def to_latent_grid(flow: Flow, factor: int) -> Flow:
    """The flow on a grid that is `factor` times coarser, in its units: a vector of `factor` pixels gets length 1.

    A cell gets the mean of its valid pixels, and is valid if at least half of them are.
    """
    height, width = flow.valid.shape[-2:]
    if height % factor or width % factor:
        raise UserError(f"flow of {height}x{width} does not divide by {factor}; use the size of the latents")
    valid_share = reduce(flow.valid.float(), "... (h p) (w q) -> ... h w", "mean", p=factor, q=factor)
    masked = torch.where(flow.valid.unsqueeze(-3), flow.vectors, torch.zeros_like(flow.vectors))
    mean = reduce(masked, "... (h p) (w q) -> ... h w", "mean", p=factor, q=factor)
    return Flow(mean / valid_share.clamp(min=1e-6).unsqueeze(-3) / factor, valid_share >= 0.5)


def _channels_first(flow: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rearrange(flow.astype(np.float32), "f h w c -> f c h w")))


@functools.cache
def _method(flow_model: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    if flow_model == "raft":
        return _raft()
    if flow_model != "dis":
        raise UserError(f"flow model '{flow_model}' is unknown; use one of {', '.join(FLOW_MODELS)}")
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)  # the default misses motion of less than four pixels, which is all that small frames have

    def by_dis(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (a, b))
        return dis.calc(a, b, None)  # type: ignore[call-overload]

    return by_dis


def _raft() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """RAFT (arXiv 2003.12039) of torchvision with its own weights, from torchvision's cache or downloaded."""
    with user_errors("flow model 'raft' needs torchvision; pip install 'microcinema[flow]', or use dis"):
        from torchvision.models.optical_flow import Raft_Large_Weights, raft_large  # type: ignore[import-not-found]
    weights = Raft_Large_Weights.DEFAULT
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = raft_large(weights=weights).eval().to(device)
    preprocess = weights.transforms()

    @torch.no_grad()
    def by_raft(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        images = preprocess(*(rearrange(torch.from_numpy(image.copy()), "h w c -> 1 c h w") for image in (a, b)))
        return rearrange(network(*(image.to(device) for image in images))[-1][0], "c h w -> h w c").cpu().numpy()

    return by_raft
