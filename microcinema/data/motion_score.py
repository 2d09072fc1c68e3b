"""How much moves in a clip, as one number: a condition of the network, told in training and asked for in sampling."""

from contextlib import suppress
from typing import Any

import cv2
import numpy as np

from microcinema.data.optical_flow import forward_flow, pixels_of
from microcinema.data.source import ClipSource, ClipWrapper, spread
from microcinema.utils.errors import UserError

UNKNOWN = -1.0  # score of a picture, and of a clip whose score is dropped
_SHORT_SIDE = 96  # pixels of larger frames at which they are measured
_MAX_DECODED = 256  # clips whose scores stand for those of a data set, where none are cached


def motion_score(frames: np.ndarray, fps: float) -> float:
    """Mean length of the optical flow over all places and frames of a clip, in thousandths of its height per second.

    So it depends on neither resolution nor frame rate. Frames are uint8 (f, h, w, 3); of a single one nothing is known, see `UNKNOWN`.
    """
    if len(frames) < 2:
        return UNKNOWN
    if (scale := _SHORT_SIDE / min(frames.shape[1:3])) < 1:
        resized = [cv2.resize(each, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for each in frames]
        frames = np.stack(resized)
    lengths = np.linalg.norm(forward_flow("dis", frames), axis=-1)
    return float(1000 * fps * lengths.mean() / frames.shape[1])


class MotionClips(ClipWrapper):
    """The items of a data set of clips with their `motion_score`."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        return {**item, "motion_score": motion_score(pixels_of(item), item["fps"])}


def motion_quantiles(dataset: ClipSource) -> list[float]:
    """Scores of a data set at its percentiles 0, 1, ..., 100: of all clips if they are cached, else of some, spread over it; a UserError if
    no clip has a score."""
    scores: Any = dataset.motion_scores
    if scores is None:
        scores = []
        for index in spread(len(dataset), _MAX_DECODED):
            with suppress(UserError):  # a broken clip
                scores.append(dataset[index]["motion_score"])
    known = np.asarray(scores)[np.asarray(scores) >= 0]
    if not known.size:
        raise UserError("no clip has a motion score, which model.motion_score=true needs; use clips of several frames")
    return np.quantile(known, np.linspace(0, 1, 101)).round(4).tolist()
