"""Which motion a Moving Sprites clip shows, found by following the object: no network, nothing fitted to generated clips.

Sprites are saturated and backgrounds muted, so colour alone separates them. The object's place, size and orientation in every frame give
one rate for each kind of motion; each rate is compared with the slowest motion of that kind that the world draws, and the largest wins.
"""

import itertools
from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage
from scipy.stats import theilslopes

from microcinema.sprites import scene

NO_MOTION = ""
"""Motion of a clip in which no object can be followed; equal to no named motion."""

_MIN_CHROMA = 18.0  # CIELAB units between object and background, below which there is no object; the world's pairs differ by 40 and more
_MIN_AREA = 12.0  # square scene units
_ANGLES = 240  # bins of the angular signature
_STEP_LIMIT = np.deg2rad(34.0)  # largest turn between neighbouring frames: under half of the star's 72 degrees
_MIN_VARIATION = 0.12  # of the angular signature, relative; circles stay below 0.02 (0.06 after H.264), squares above 0.14 even when blurred
_MIN_SHARE = 0.5  # of the slowest named motion, below which the object stays still
_BOUNCE_FIT = 0.6  # share of the vertical variance that a bounce must explain


@dataclass(frozen=True)
class Track:
    """The object in every frame, in scene units: `place` (f, 2) x and y, `radius` (f,) of the disc of equal area, `angle` (f,) in radians
    from the first frame on, clockwise; `found` and `whole` (f,) bool: seen at all, and not cut by the frame's border. NaN where not
    found."""

    place: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    found: np.ndarray
    whole: np.ndarray


@dataclass(frozen=True)
class Motion:
    """The verdict: `name` out of `scene.MOTIONS` or `NO_MOTION`, `speed` out of `scene.SPEEDS` or empty, and the `rates` behind it:
    x and y (scene units a second), turn (radians a second), scale (log radius a second), bounce (scene units of height)."""

    name: str
    speed: str
    rates: dict[str, float]


def segment(frames: np.ndarray) -> np.ndarray:
    """Soft mask of the object, float32 (f, h, w) in [0, 1], all zero where a frame has none; `frames` uint8 (f, h, w, 3).

    Every pixel's chroma is read as a mixture of the background's and the object's (a matte), so that edges keep their coverage.
    """
    count, height, width, _ = frames.shape
    lab = cv2.cvtColor(frames.reshape(count * height, width, 3).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    chroma = lab[..., 1:].reshape(count, height, width, 2)
    background = np.median(chroma.reshape(-1, 2), axis=0)
    difference = chroma - background
    distance = np.linalg.norm(difference, axis=-1)
    strongest = np.quantile(distance.reshape(count, -1), 0.99, axis=1)
    level = np.median(strongest)
    if level < _MIN_CHROMA:
        return np.zeros((count, height, width), np.float32)
    direction = np.median(difference[distance > 0.75 * level], axis=0)
    matte = np.clip(difference @ direction / (direction @ direction), 0, 1).astype(np.float32)
    matte = np.clip((matte - 0.15) / 0.7, 0, 1)  # below and above: texture of the background, light on the object

    masks = np.zeros_like(matte)
    neighbourhood = np.ones((3, 3), bool)
    for mask, alpha in zip(masks, matte, strict=True):
        labels, number = ndimage.label(alpha > 0.5, neighbourhood)
        if number:
            sizes = ndimage.sum_labels(alpha, labels, np.arange(1, number + 1))
            largest = ndimage.binary_dilation(labels == 1 + int(np.argmax(sizes)), neighbourhood)
            mask[:] = np.where(largest, alpha, 0)
    return masks


def _angular_signature(mask: np.ndarray, place: np.ndarray, reach: float) -> np.ndarray:
    """Mass of the mask along each direction from `place` (pixels), (_ANGLES,); the first points right, then clockwise."""
    angle = 2 * np.pi * np.arange(_ANGLES) / _ANGLES
    distance = np.arange(0.5, reach, 0.5)
    x = (place[0] + np.outer(np.cos(angle), distance)).astype(np.float32)
    y = (place[1] + np.outer(np.sin(angle), distance)).astype(np.float32)
    polar = cv2.remap(mask, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    return polar @ distance


def _turn(before: np.ndarray, after: np.ndarray) -> float:
    """Angle by which signature `before` has to turn clockwise to fit `after`: the peak of their circular correlation, radians."""
    correlation = np.fft.irfft(
        np.fft.rfft(after - after.mean()) * np.conj(np.fft.rfft(before - before.mean())), _ANGLES
    )
    limit = int(_STEP_LIMIT / (2 * np.pi) * _ANGLES)
    shifts = np.arange(-limit, limit + 1)
    near = correlation[shifts]
    peak = int(np.argmax(near))
    if peak in (0, len(shifts) - 1):
        return 0.0  # no peak within the limit: the outline changed rather than turned
    left, middle, right = near[peak - 1 : peak + 2]
    offset = 0.5 * (left - right) / (left - 2 * middle + right)
    return float((shifts[peak] + offset) * 2 * np.pi / _ANGLES)


def track(frames: np.ndarray) -> Track:
    """Follows the object through `frames` uint8 (f, h, w, 3), square."""
    masks = segment(frames)
    count, height, width = masks.shape
    unit = scene.WORLD / width
    y, x = np.mgrid[:height, :width].astype(np.float32)
    place, radius = np.full((count, 2), np.nan), np.full(count, np.nan)
    signatures = np.full((count, _ANGLES), np.nan)
    whole = np.zeros(count, bool)
    for index, mask in enumerate(masks):
        area = float(mask.sum())
        if area * unit**2 < _MIN_AREA:
            continue
        centre = np.array([(x * mask).sum() / area, (y * mask).sum() / area])
        place[index] = (centre + 0.5) * unit
        radius[index] = np.sqrt(area / np.pi) * unit
        edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        whole[index] = (edge > 0.5).sum() * unit < 2
        signatures[index] = _angular_signature(mask, centre, 2.2 * np.sqrt(area / np.pi)) / area
    return Track(place, radius, _angles(signatures), ~np.isnan(radius), whole)


def _angles(signatures: np.ndarray) -> np.ndarray:
    """Orientation (f,) since the first frame, from signatures (f, _ANGLES) with NaN rows where there is no object:
    the sum of the small turns between neighbouring frames, so that the symmetry of a square or a star stays harmless. All zero for a round outline."""
    angle = np.where(np.isnan(signatures[:, 0]), np.nan, 0.0)
    known = np.flatnonzero(~np.isnan(angle))
    if len(known) < 2 or np.median(signatures[known].std(axis=1) / signatures[known].mean(axis=1)) < _MIN_VARIATION:
        return angle
    angle[known[1:]] = np.cumsum([_turn(signatures[a], signatures[b]) for a, b in itertools.pairwise(known)])
    return angle


def _rate(seconds: np.ndarray, values: np.ndarray, use: np.ndarray) -> float:
    """Slope of `values` over time by Theil and Sen, which a third of bad frames does not move; 0 with fewer than three frames."""
    use = use & ~np.isnan(values)
    return float(theilslopes(values[use], seconds[use])[0]) if use.sum() >= 3 else 0.0


def _bounce(seconds: np.ndarray, height: np.ndarray) -> tuple[float, float, float]:
    """Least-squares fit of `ground + amplitude |sin(pi t / period)|` to the height: (amplitude, period, share of the variance explained)."""
    spread = float(((height - height.mean()) ** 2).sum())
    best = (0.0, scene.BOUNCE_PERIOD[0], 0.0)
    for period in np.geomspace(0.75 * scene.BOUNCE_PERIOD[1], 1.3 * scene.BOUNCE_PERIOD[0], 60):
        design = np.stack([np.ones_like(seconds), np.abs(np.sin(np.pi * seconds / period))], axis=1)
        solution, *_ = np.linalg.lstsq(design, height, rcond=None)
        explained = 1 - float(((design @ solution - height) ** 2).sum()) / max(spread, 1e-9)
        if solution[1] > 0 and explained > best[2]:
            best = (float(solution[1]), float(period), explained)
    return best


def judge_motion(frames: np.ndarray, fps: float) -> Motion:
    """Names the motion of a clip, uint8 (f, h, w, 3), square; thresholds come from the world's own constants."""
    followed = track(frames)
    found, whole = followed.found, followed.found & followed.whole
    rates = dict.fromkeys(("x", "y", "turn", "scale", "bounce"), 0.0)
    if found.sum() < max(3, len(frames) / 2):
        return Motion(NO_MOTION, "", rates)
    if whole.sum() < 3:
        whole = found  # cut by the border throughout: better a biased size than none
    seconds = np.arange(len(frames)) / fps
    rates["x"] = _rate(seconds, followed.place[:, 0], found)
    rates["y"] = _rate(seconds, followed.place[:, 1], found)
    rates["turn"] = _rate(seconds, followed.angle, whole)
    rates["scale"] = _rate(seconds, np.log(followed.radius), whole)
    amplitude, period, explained = _bounce(seconds[found], -followed.place[found, 1])
    line = np.polyfit(seconds[found], followed.place[found, 1], 1)
    straight = 1 - np.var(followed.place[found, 1] - np.polyval(line, seconds[found])) / max(
        np.var(followed.place[found, 1]), 1e-9
    )
    if explained > max(_BOUNCE_FIT, straight):
        rates["bounce"] = amplitude

    # Each motion's magnitude over the smallest one of its name.
    shares = {
        "left": -rates["x"] / scene.TRANSLATION_SPEED[0],
        "up": -rates["y"] / scene.TRANSLATION_SPEED[0],
        "clockwise": rates["turn"] / scene.ROTATION_SPEED[0],
        "growing": rates["scale"] / scene.SCALING_SPEED[0],
        "bouncing": rates["bounce"] / scene.BOUNCE_HEIGHT,
    }
    opposite = {"left": "right", "up": "down", "clockwise": "counterclockwise", "growing": "shrinking"}
    shares |= {other: -shares[name] for name, other in opposite.items()}
    if shares["bouncing"] > _MIN_SHARE:
        name = "bouncing"  # its vertical drift within the clip is part of it
    else:
        name = max(shares, key=lambda key: shares[key])
        if shares[name] < _MIN_SHARE:
            return Motion("still", "", rates)
    if name == "bouncing":
        quick = period < np.sqrt(np.prod(scene.BOUNCE_PERIOD))
    else:
        # Between the two named speeds, on a logarithmic scale.
        slow, fast = _named_speeds(name)
        quick = shares[name] > np.sqrt(fast / slow)
    return Motion(name, scene.SPEEDS[int(quick)], rates)


def _named_speeds(name: str) -> tuple[float, float]:
    if name in scene.TRANSLATIONS:
        return scene.TRANSLATION_SPEED
    return scene.ROTATION_SPEED if name in scene.ROTATIONS else scene.SCALING_SPEED
