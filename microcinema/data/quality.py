"""Quality of clips: whether they decode, move, cut to another scene, bear a watermark, or show the same as another one."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from microcinema.config.schema import PrepareCheck
from microcinema.data import video_reader
from microcinema.data.decoder_process import DecoderProcess
from microcinema.data.manifest import SCHEMA
from microcinema.utils.errors import UserError

SIZE = (96, 160)  # height and width at which frames are examined
FPS = 8.0  # frames per second that are examined
MAX_FRAMES = 600  # examined frames of a clip: its first 75 seconds
MIN_TEMPLATE_CLIPS = 16  # fewer clips share edges by chance
_MIN_CUT = 15.0  # smallest frame difference at a cut, in levels of 255
_CUT_RATIO = 3.0  # of a cut to the frame differences right before and after it
_MAX_HASH_DISTANCE = 12  # bits of 192 by which the hashes of two copies of a clip may differ
_JUDGED = ("decodable", "num_frames", "duration", "motion", "cut", "watermark")


@dataclass(frozen=True)
class ClipSurvey:
    """A clip at low resolution and frame rate."""

    info: video_reader.VideoInfo
    times: np.ndarray  # seconds after the first frame, (n,)
    frames: np.ndarray  # uint8 (n, *SIZE, 3)


def survey_clip(decoder: DecoderProcess, source: video_reader.Source) -> ClipSurvey:
    """Decodes a video, or a picture as a clip of one frame; a UserError if it cannot be decoded, or not in time."""
    if video_reader.is_image(source):
        picture = decoder("read_image", source)[0]
        height, width = picture.shape[:2]
        frame = cv2.resize(picture, SIZE[::-1], interpolation=cv2.INTER_AREA)
        return ClipSurvey(video_reader.VideoInfo(1, 0.0, width, height, 0.0), np.zeros(1), frame[None])
    return ClipSurvey(*decoder("survey", source, SIZE, FPS, MAX_FRAMES))


def find_cut(differences: np.ndarray) -> int | None:
    """Index of the frame that begins a new scene, at the strongest cut, by the mean differences of neighbors (n - 1,), of 255; None: no cut.

    A cut is one large difference between small ones: fast motion is large for many frames, a flash for two. Fades are not detected.
    """
    if len(differences) < 2:
        return None
    padded = np.pad(differences, 1, constant_values=0.0)
    neighbors = np.maximum(padded[:-2], padded[2:])
    cuts = np.flatnonzero((differences > _MIN_CUT) & (differences > _CUT_RATIO * neighbors))
    return int(cuts[np.argmax(differences[cuts])]) + 1 if len(cuts) else None


def mean_motion(differences: np.ndarray, cut: int | None) -> float | None:
    """Mean frame difference without the one at the cut; None: fewer than two frames."""
    return float((differences if cut is None else np.delete(differences, cut - 1)).mean()) if len(differences) else None


def hashes(frames: np.ndarray) -> list[int]:
    """Difference hashes of the first, middle and last frame, 64 bits each, which survive another size, bit rate or codec."""
    values = []
    for frame in frames[[0, len(frames) // 2, -1]]:
        cells = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA).astype(int)
        values.append(int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big"))
    return values


def persistent_edges(frames: np.ndarray) -> np.ndarray:
    """Median image gradient of a clip over at most 16 frames, float32 (2, h, w)."""
    indices = np.linspace(0, len(frames) - 1, min(16, len(frames))).astype(int)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames[indices]]
    gradients = [[cv2.Sobel(image, cv2.CV_32F, dx, 1 - dx) for image in gray] for dx in (1, 0)]
    return np.median(gradients, axis=1).astype(np.float32)


def watermark_template(edges: Sequence[np.ndarray]) -> np.ndarray | None:
    """Strongest twentieth of the median of many clips' persistent edges, float32 (2, h, w), else zero; None: too few clips.

    After Dekel et al., CVPR 2017, section 3.1.
    """
    if len(edges) < MIN_TEMPLATE_CLIPS:
        return None
    template = np.median(np.stack(edges), axis=0).astype(np.float32)
    strength = np.hypot(*template)
    template[:, strength < np.quantile(strength, 0.95)] = 0
    return template


def watermark_score(edges: np.ndarray, template: np.ndarray) -> float:
    """Correlation, -1 to 1, of a clip's persistent edges with the template, where the template is not zero."""
    mask = np.hypot(*template) > 0
    a, b = edges[:, mask].ravel(), template[:, mask].ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else 0.0


def measure(
    decoder: DecoderProcess, source: video_reader.Source, template: np.ndarray | None
) -> tuple[dict[str, Any], ClipSurvey | None]:
    """The manifest's measures of one clip, and its survey (None: it cannot be decoded)."""
    try:
        survey = survey_clip(decoder, source)
    except UserError as error:
        return {"file": str(source), "decodable": False, "reason": str(error)}, None
    differences = np.array([cv2.absdiff(a, b).mean() for a, b in itertools.pairwise(survey.frames)])
    cut = find_cut(differences)
    return {
        "file": str(source),
        "decodable": True,
        **vars(survey.info),
        "motion": mean_motion(differences, cut),
        "cut": None if cut is None else float(survey.times[cut]),
        "watermark": None if template is None else watermark_score(persistent_edges(survey.frames), template),
        "hashes": hashes(survey.frames),
    }, survey


def first_copies(clip_hashes: np.ndarray) -> np.ndarray:
    """Index of the first clip that shows the same as each clip, -1 for none, from their hashes, uint64 (n, 3), zeros for none.

    Candidates share one of their three hashes exactly; of all bits at most a sixteenth may differ.
    """
    first = np.full(len(clip_hashes), -1)
    for column in range(clip_hashes.shape[1]):
        order = np.argsort(clip_hashes[:, column], kind="stable")  # clips of equal hash stay in their order
        values = clip_hashes[order, column]
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
        for start, stop in zip(starts, np.r_[starts[1:], len(values)], strict=True):
            if stop - start < 2 or values[start] == 0:  # zero: a frame of one color
                continue
            members = order[start:stop]
            bits = np.unpackbits((clip_hashes[members] ^ clip_hashes[members[0]]).view(np.uint8), axis=1).sum(axis=1)
            copies = members[1:][bits[1:] <= _MAX_HASH_DISTANCE]
            first[copies] = np.where(first[copies] < 0, members[0], np.minimum(first[copies], members[0]))
    return first


def failed_checks(columns: Mapping[str, np.ndarray], config: PrepareCheck) -> dict[str, np.ndarray]:
    """Which clips fail each check that looks at single clips, bool (n,), whether or not it rejects them; unknown measures are NaN."""
    num_frames, fps = config.num_frames, config.fps
    if fps is None or num_frames == 1:
        short = columns["num_frames"] < num_frames
    else:
        short = columns["duration"] <= (num_frames - 1) / fps
    return {
        "broken": columns["decodable"] != 1,
        "short": short,
        "static": columns["motion"] < config.min_motion,
        "cut": ~np.isnan(columns["cut"]),
        "watermark": columns["watermark"] > config.max_watermark_score,
    }


def verdict(measures: Mapping[str, Any], config: PrepareCheck) -> str:
    """The failed checks of one clip with commas between, or "accepted"."""
    columns = {name: np.array([measures.get(name)], dtype=float) for name in _JUDGED}  # None becomes NaN
    return ", ".join(name for name, fails in failed_checks(columns, config).items() if fails[0]) or "accepted"


def judge(table: pa.Table, config: PrepareCheck) -> pa.Table:
    """The table of measures with the columns that depend on all clips or on the limits in the config; broken clips are always rejected."""
    columns = {name: table.column(name).cast(pa.float64()).to_numpy() for name in _JUDGED}
    no_hashes = pa.scalar([0, 0, 0], SCHEMA.field("hashes").type)
    clip_hashes = pc.fill_null(pc.list_flatten(pc.coalesce(table.column("hashes"), no_hashes)), 0)
    first = first_copies(clip_hashes.to_numpy().reshape(-1, 3))
    keys = table.column("key").combine_chunks()  # several captions of one file are no duplicates
    first[pc.fill_null(pc.equal(keys, keys.take(pa.array(first, mask=first < 0))), False).to_numpy(False)] = -1
    failed = {**failed_checks(columns, config), "duplicate": first >= 0}
    rejecting = {name: fails for name, fails in failed.items() if name == "broken" or name in config.reject}
    rejected = np.any(list(rejecting.values()), axis=0)
    reasons = np.full(len(first), None, dtype=object)
    for k in np.flatnonzero(rejected).tolist():
        reasons[k] = ", ".join(name for name, fails in rejecting.items() if fails[k])
    verdicts = {
        "static": pc.if_else(pa.array(np.isnan(columns["motion"])), None, pa.array(failed["static"])),
        "duplicate_of": pc.take(table.column("id").combine_chunks(), pa.array(first, mask=first < 0)),
        "accepted": pa.array(~rejected),
        "rejected_for": pa.array(reasons, pa.string()),
    }
    for name, values in verdicts.items():
        table = table.set_column(table.column_names.index(name), SCHEMA.field(name), values)
    return table
