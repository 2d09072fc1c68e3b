"""Clips with the optical flow that PredictNet learns from, computed as each clip is read."""

from collections.abc import Callable
from typing import Any

import torch

from microcinema.config.compose import instantiate
from microcinema.data.optical_flow import FLOW_MODELS, Flow, estimate, to_latent_grid
from microcinema.data.source import ClipSource, ClipWrapper
from microcinema.utils.errors import UserError


class FlowClips(ClipWrapper):
    """The items of a data set of clips with `flow` float32 (f-1, 2, h, w) and `flow_valid` bool (f-1, h, w), on the latent grid.

    `raft` works on the GPU only in the main process: with it take dataloader_num_workers=0, and rather for encoding the data set once.

    Args:
        dataset: of clips.
        teacher: `dis` or `raft`; or the full name of a class that is constructed from the data set and gives the `Flow` of an item.
        factor: pixels per place of the latent grid.

    Raises:
        UserError: an unknown teacher, or one that does not know the flow of this data set.
    """

    def __init__(self, dataset: ClipSource, teacher: str, factor: int) -> None:
        if teacher not in FLOW_MODELS and "." not in teacher:
            raise UserError(
                f"model.flow_model={teacher} is unknown; use {', '.join(FLOW_MODELS)} or the full name of a class"
            )
        super().__init__(dataset)
        self.teacher, self.factor = teacher, factor
        self._flow: Callable[[dict[str, Any]], Flow] = self._estimated
        if teacher not in FLOW_MODELS:
            self._flow = instantiate({"_target_": teacher}, dataset=dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        flow = to_latent_grid(self._flow(item), self.factor)
        return {**item, "flow": flow.vectors, "flow_valid": flow.valid}

    def _estimated(self, item: dict[str, Any]) -> Flow:
        pixels = ((item["video"] + 1) * 127.5).round().to(torch.uint8)
        return estimate(self.teacher, pixels.permute(0, 2, 3, 1).contiguous().numpy())
