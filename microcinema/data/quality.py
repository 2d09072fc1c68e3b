"""What can be said of a clip by looking at it: does it decode, does it move, does it cut, does it bear a watermark, is it there twice."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from microcinema.data import video_reader
from microcinema.data.clip_reader import IMAGES
from microcinema.data.decoder_process import IsolatedReader
from microcinema.utils.errors import UserError

SIZE = (96, 160)  # height and width in which clips are looked at
FPS = 8.0  # frames per second that are looked at
MOST = 600  # frames of a clip that are looked at, the first 75 seconds
NEEDED = 16  # clips from which on something in common can be told from their own edges
_CUT = 15.0  # levels of 255 by which frames on the two sides of a cut differ at least
_PEAK = 3.0  # times that a cut stands out from the changes right before and after it
_SAME = 12  # bits of 192 in which the hashes of two copies of a clip may differ


@dataclass(frozen=True)
class Look:
    """A clip as the audit sees it.

    Attributes:
        info: what the file holds.
        times: seconds of each frame after the first one, (n,).
        frames: uint8 (n, *SIZE, 3).
    """

    info: video_reader.VideoInfo
    times: np.ndarray
    frames: np.ndarray


def look(reader: IsolatedReader, source: video_reader.Source) -> Look:
    """Decodes a clip, or a picture.

    Raises:
        UserError: it cannot be decoded, or not in time.
    """
    name = source.name if isinstance(source, video_reader.Member) else str(source)
    if name.lower().endswith(IMAGES):
        picture = reader("read_image", source)[0]
        height, width = picture.shape[:2]
        small = cv2.resize(picture, SIZE[::-1], interpolation=cv2.INTER_AREA)
        return Look(video_reader.VideoInfo(1, 0.0, width, height, 0.0), np.zeros(1), small[None])
    return Look(*reader("survey", source, SIZE, FPS, MOST))


def changes(frames: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring frames in levels of 255, (n - 1,)."""
    return np.array([cv2.absdiff(one, other).mean() for one, other in itertools.pairwise(frames)])


def find_cut(difference: np.ndarray) -> int | None:
    """The frame that begins a new scene; of several the strongest; None: no cut.

    A cut is one large change between smaller ones: fast motion is large for many frames, a flash for two. Fades are not found.
    """
    if len(difference) < 2:
        return None
    around = np.pad(difference, 1, constant_values=0.0)
    beside = np.maximum(around[:-2], around[2:])
    cuts = np.flatnonzero((difference > _CUT) & (difference > _PEAK * beside))
    return int(cuts[np.argmax(difference[cuts])]) + 1 if len(cuts) else None


def hashes(frames: np.ndarray) -> list[int]:
    """Difference hashes of the first, middle and last frame: 64 bits each, by which of two neighbouring cells is brighter.

    They stand what copies of a video go through: another size, bit rate or codec.
    """
    found = []
    for frame in frames[[0, len(frames) // 2, -1]]:
        cells = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA).astype(int)
        found.append(int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big"))
    return found


def persistent_edges(frames: np.ndarray) -> np.ndarray:
    """The gradient that stays in a clip: its median over at most 16 frames, float32 (2, h, w)."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(16, len(frames))).astype(int)]
    gray = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in chosen]).astype(np.float32)
    across = np.stack([cv2.Sobel(frame, cv2.CV_32F, 1, 0) for frame in gray])
    down = np.stack([cv2.Sobel(frame, cv2.CV_32F, 0, 1) for frame in gray])
    return np.stack([np.median(across, axis=0), np.median(down, axis=0)])


def watermark_template(edges: Sequence[np.ndarray]) -> np.ndarray | None:
    """What the lasting edges of many clips have in common, float32 (2, h, w): their median (Dekel et al., CVPR 2017, section 3.1).

    Only its strongest twentieth is kept, where a watermark is if there is one. None: too few clips to tell.
    """
    if len(edges) < NEEDED:
        return None
    common = np.median(np.stack(edges), axis=0).astype(np.float32)
    strength = np.hypot(*common)
    common[:, strength < np.quantile(strength, 0.95)] = 0
    return common


def watermark_score(edges: np.ndarray, template: np.ndarray) -> float:
    """Correlation, -1 to 1, of a clip's lasting edges with the template, where the template is."""
    where = np.hypot(*template) > 0
    one, other = edges[:, where].ravel(), template[:, where].ravel()
    scale = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / scale if scale > 0 else 0.0


def measure(
    reader: IsolatedReader, source: video_reader.Source, template: np.ndarray | None
) -> tuple[dict[str, Any], Any]:
    """What the manifest says of a clip, but for what only the others can tell, and its `Look` (None: it cannot be decoded)."""
    try:
        seen = look(reader, source)
    except UserError as error:
        return {"file": str(source), "decodable": False, "reason": str(error)}, None
    difference = changes(seen.frames)
    cut = find_cut(difference)
    info = seen.info
    return {
        "file": str(source),
        "decodable": True,
        "num_frames": info.num_frames,
        "fps": info.fps,
        "width": info.width,
        "height": info.height,
        "duration": info.duration,
        # Of the whole clip the largest scene's motion would be fairer; a cut that is left out of the mean comes near.
        "motion": float(np.delete(difference, cut - 1).mean() if cut else difference.mean())
        if len(difference)
        else None,
        "cut": None if cut is None else float(seen.times[cut]),
        "watermark": None if template is None else watermark_score(persistent_edges(seen.frames), template),
        "hashes": hashes(seen.frames),
    }, seen


def duplicates(found: np.ndarray) -> np.ndarray:
    """For each clip the first one that shows the same, -1 for none.

    Candidates share one of their three hashes to the bit; of all bits at most a sixteenth may differ.

    Args:
        found: hashes of all clips, uint64 (n, 3); zeros for none.
    """
    first = np.full(len(found), -1)
    for column in range(found.shape[1]):
        order = np.argsort(found[:, column], kind="stable")  # within a group clips stay in their order
        values = found[order, column]
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
        for start, stop in zip(starts, np.r_[starts[1:], len(values)], strict=True):
            if stop - start < 2 or values[start] == 0:  # zero: a frame of one colour, which says nothing
                continue
            members = order[start:stop]
            bits = np.unpackbits((found[members] ^ found[members[0]]).view(np.uint8), axis=1).sum(axis=1)
            same = members[1:][bits[1:] <= _SAME]
            first[same] = np.where(first[same] < 0, members[0], np.minimum(first[same], members[0]))
    return first
