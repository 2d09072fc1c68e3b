"""Watermarks in a known box, such as WebVid's: cropped, inpainted, or named in the caption."""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from pydantic import with_config

from microcinema.config.instantiate import check_fields
from microcinema.config.types import CONFIG, Fraction
from microcinema.utils.errors import UserError


@with_config(CONFIG)
@dataclass(frozen=True)
class Watermark:
    """Handles the watermark of clips.

    Args:
        action: "crop" keeps the largest region beside the box, at the clip's aspect ratio; "mask" inpaints the box frame by frame (OpenCV, after
            Telea, 2004); "tag" keeps the frames and appends `tag` to the captions, so that sampling without it, or with it as the negative prompt,
            avoids the watermark.
        box: left, top, right, bottom as fractions of the frame's width and height.

    Raises:
        UserError: an unknown action, or an invalid box.
    """

    action: Literal["crop", "mask", "tag"]
    box: tuple[Fraction, Fraction, Fraction, Fraction]
    tag: str = "watermark"

    def __post_init__(self) -> None:
        check_fields(self, "watermark.")
        if not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise UserError(f"watermark box={list(self.box)}; give [left, top, right, bottom], in this order")
        if self.action == "crop" and tuple(self.box) == (0, 0, 1, 1):
            raise UserError("watermark box covers the whole frame, of which crop leaves nothing; choose a smaller box")

    def pixels(self, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Frames without the watermark, uint8 (f, h, w, 3); `size` is (height, width) of the clip, whose aspect ratio decides what crop keeps."""
        if self.action == "tag":
            return frames
        height, width = frames.shape[1:3]
        left, right = int(self.box[0] * width), -int(-self.box[2] * width // 1)
        top, bottom = int(self.box[1] * height), -int(-self.box[3] * height // 1)
        if self.action == "crop":
            regions = [(0, top, 0, width), (bottom, height, 0, width), (0, height, 0, left), (0, height, right, width)]

            def cropped_area(region: tuple[int, int, int, int]) -> float:
                """Pixels of a region that a center crop to the clip's aspect ratio keeps."""
                h, w = region[1] - region[0], region[3] - region[2]
                return min(h, w * size[0] / size[1]) * min(w, h * size[1] / size[0])

            y0, y1, x0, x1 = max(regions, key=cropped_area)
            return frames[:, y0:y1, x0:x1]
        # On the surroundings of the box alone, several times faster than on the whole frame.
        y0, y1, x0, x1 = max(0, top - 8), min(height, bottom + 8), max(0, left - 8), min(width, right + 8)
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        mask[top - y0 : bottom - y0, left - x0 : right - x0] = 1
        inpainted = frames.copy()
        for frame in inpainted:
            frame[y0:y1, x0:x1] = cv2.inpaint(frame[y0:y1, x0:x1], mask, 3, cv2.INPAINT_TELEA)
        return inpainted

    def caption(self, text: str) -> str:
        """The caption of a clip with the watermark."""
        return f"{text}, {self.tag}" if self.action == "tag" else text
