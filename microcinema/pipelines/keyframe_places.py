"""Where the key frames of a call may be, for the model at hand; and the frames between frames that are key frames."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from microcinema.data.keyframe_index import keyframe_index
from microcinema.data.keyframe_places import main_keyframe
from microcinema.pipelines.keyframe import as_pil
from microcinema.pipelines.prompts import broadcast_to_prompts
from microcinema.utils.errors import UserError


@dataclass(frozen=True)
class TrainedPlaces:
    """The places of key frames that a model was trained for.

    Args:
        position: the model's own, `first`, `center` or a frame number.
        others: whether it was trained for others, with `model.keyframe_places`.
        needs_own: whether one has to be at its own place in any case, since the network has the pixels of that one.
    """

    position: str | int
    others: bool
    needs_own: bool

    def fault(self, places: Collection[int], frames: int) -> str | None:
        """Why the key frames of a clip of so many frames cannot be at these; None if they can."""
        own = keyframe_index(self.position, frames)
        if set(places) == {own} or (self.others and (own in places or not self.needs_own)):
            return None
        if self.others:
            return f"this model reads the pixels of the key frame at frame {own}; add that one"
        return f"this model was trained for frame {own} alone; use that, or a model with model.keyframe_places=true"

    def main(self, places: Collection[int], frames: int) -> int:
        """The place of the main key frame (data/keyframe_places.py); a UserError if there can be none at one of these."""
        wrong = [place for place in places if type(place) is not int or not 0 <= place < frames]
        if wrong or not places:
            which = f"a key frame is at {wrong[0]!r}" if wrong else "there is no key frame"
            raise UserError(f"{which}, in a clip of {frames} frames; use 0 to {frames - 1}")
        if fault := self.fault(places, frames):
            raise UserError(f"key frames are at {', '.join(map(str, sorted(places)))}, but {fault}")
        mask = torch.isin(torch.arange(frames), torch.tensor(sorted(places)))
        return int(main_keyframe(mask, keyframe_index(self.position, frames)))


def read_keyframes(entries: Sequence[int | str] | None) -> dict[int, Path | None] | None:
    """The key `keyframes` of `sample`: a file for each place, None for the key frame of the prompt. A UserError for an entry that is neither
    `place` nor `place:file`, or a place that occurs twice."""
    keyframes: dict[int, Path | None] = {}
    for entry in entries or ():
        place, _, file = str(entry).partition(":")
        if not place.isdecimal() or (":" in str(entry) and not file.strip()):
            raise UserError(f"keyframes has the entry '{entry}'; use place:file, or place alone for the prompt's own")
        if int(place) in keyframes:
            raise UserError(f"keyframes has two images at frame {int(place)}; give one")
        keyframes[int(place)] = Path(file.strip()) if file else None
    return None if entries is None else keyframes


def split_keyframes(keyframes: Mapping[int, Any], main: int) -> tuple[Any, dict[int, Any]]:
    """The key frame of a video, and all its places, with None for that one: if no place has None, it is the main one."""
    if any(value is None for value in keyframes.values()):
        return None, dict(keyframes)
    return keyframes[main], {**keyframes, main: None}


def keyframe_images(
    image: Any, keyframes: Mapping[int, Any] | None, own: int, count: int
) -> dict[int, list[Image.Image]]:
    """The images at each place, one for each of `count` prompts; arguments as of `ImageToVideoPipeline.__call__`."""

    def images(given: Any) -> list[Image.Image]:
        batch = list(given) if getattr(given, "ndim", 3) == 4 else given
        return [as_pil(entry) for entry in broadcast_to_prompts("images", batch, count)]

    chosen = {own: None} if keyframes is None else keyframes
    missing = [place for place, given in chosen.items() if given is None]
    if (image is None) != (not missing):
        fault = "no image for the key frame" if missing else "an image for no key frame, all have others"
        raise UserError(f"there is {fault}; give `image` for places with None, and for these alone")
    return {place: images(image if given is None else given) for place, given in chosen.items()}


def interpolation_windows(frames: int, factor: int, length: int) -> list[slice]:
    """Which of `frames` key frames each clip of at most `length` frames has, `factor` frames apart; neighbors share one or more.

    All have the same number, so that the last one may begin earlier than the one before ends.
    """
    gaps = min((length - 1) // factor, frames - 1)
    starts = [min(start, frames - 1 - gaps) for start in range(0, frames - 1, gaps)]
    return [slice(start, start + gaps + 1) for start in starts]


def check_interpolation(factor: int, frames: int, length: int, places: TrainedPlaces) -> None:
    """Refuses the interpolation of a video of so many frames by a model of clips of `length` frames that cannot do it."""
    if factor == 1:
        return
    if frames < 2 or length <= factor:
        needed = f"interpolate={factor} needs 2 frames and a model of {factor + 1} or more"
        raise UserError(f"{needed}; this video has {frames}, and the model {length}; use interpolate=1")
    window = interpolation_windows(frames, factor, length)[0]
    clip = factor * (window.stop - 1) + 1
    if fault := places.fault(range(0, clip, factor), clip):
        raise UserError(f"interpolate={factor} places key frames at every {factor} frames, but {fault}")
