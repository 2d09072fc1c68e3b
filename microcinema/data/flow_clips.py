"""Clips with the optical flow that PredictNet learns from, by a teacher, made as each clip is read."""

from typing import Any

import torch

from microcinema.data.clips import ClipDataset
from microcinema.data.optical_flow import TEACHERS, Flow, estimate, exact, to_latent_grid
from microcinema.data.source import ClipSource, ClipWrapper
from microcinema.sprites import scene
from microcinema.sprites.dataset import read_truth
from microcinema.utils.errors import UserError


class FlowClips(ClipWrapper):
    """The items of a data set of clips with `flow` float32 (f-1, 2, h, w) and `flow_valid` bool (f-1, h, w), on the latent grid.

    `raft` works on the GPU only in the main process: with it take dataloader_num_workers=0, and rather for encoding the data set once.

    Args:
        dataset: of clips.
        teacher: `dis`, `raft`, or `ground_truth` for Moving Sprites, which must be square and read from their beginning.
        factor: pixels per place of the latent grid.

    Raises:
        UserError: an unknown teacher, or a data set of which the truth is not known.
    """

    def __init__(self, dataset: ClipSource, teacher: str, factor: int) -> None:
        if teacher not in TEACHERS:
            raise UserError(f"flow teacher '{teacher}' is unknown; use one of {', '.join(TEACHERS)}")
        super().__init__(dataset)
        self.teacher, self.factor = teacher, factor
        self._sprites: dict[str, scene.Sprite] = {}
        if teacher == "ground_truth":
            if not isinstance(dataset, ClipDataset) or dataset.root is None:
                raise UserError("flow teacher 'ground_truth' needs the folder of Moving Sprites; use dis")
            if dataset.clip_position != "first" or len(set(dataset.reader.size)) != 1:
                raise UserError(
                    "flow teacher 'ground_truth' needs square clips from the beginning (clip_position=first); use dis"
                )
            self._sprites = {name: sprite for name, sprite, *_ in read_truth(dataset.root)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        flow = to_latent_grid(self._flow(item), self.factor)
        return {**item, "flow": flow.vectors, "flow_valid": flow.valid}

    def _flow(self, item: dict[str, Any]) -> Flow:
        frames, size = len(item["video"]), item["video"].shape[-1]
        if self.teacher == "ground_truth":
            return exact(scene.render(self._sprites[item["id"]], frames, size, item["fps"]).flow)
        pixels = ((item["video"] + 1) * 127.5).round().to(torch.uint8)
        return estimate(self.teacher, pixels.permute(0, 2, 3, 1).contiguous().numpy())
