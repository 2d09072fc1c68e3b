"""The true optical flow of Moving Sprites, for `model.flow_model=microcinema.sprites.flow.GroundTruthFlow`."""

from typing import Any

from microcinema.data.clips import ClipDataset
from microcinema.data.optical_flow import Flow, exact
from microcinema.data.source import ClipSource
from microcinema.sprites import scene
from microcinema.sprites.dataset import read_truth
from microcinema.utils.errors import UserError


class GroundTruthFlow:
    """Flow of the items of a Moving Sprites `ClipDataset`, square and read from their beginning, rendered from its truth file. A UserError
    for another data set, or clips whose truth is not known."""

    def __init__(self, dataset: ClipSource) -> None:
        if not isinstance(dataset, ClipDataset) or dataset.root is None:
            raise UserError("the true flow is known for the folder of Moving Sprites only; use model.flow_model=dis")
        if dataset.clip_position != "first" or len(set(dataset.reader.size)) != 1:
            raise UserError("the true flow needs square clips and clip_position=first; use model.flow_model=dis")
        self._sprites = {name: sprite for name, sprite, *_ in read_truth(dataset.root)}

    def __call__(self, item: dict[str, Any]) -> Flow:
        """Flow of an item in pixels: vectors (f-1, 2, h, w), valid everywhere."""
        frames, size = len(item["video"]), item["video"].shape[-1]
        return exact(scene.render(self._sprites[item["id"]], frames, size, item["fps"]).flow)
