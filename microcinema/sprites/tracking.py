"""The motion that a Moving Sprites clip shows, by tracking the object: no network, nothing fitted to generated clips.

Sprites are saturated and backgrounds muted, so color alone separates them. Position, size and orientation of the object in every frame
give one rate for each kind of motion; each rate is divided by the slowest motion of that kind in the world, and the largest ratio wins.
"""

import itertools
from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage
from scipy.stats import theilslopes

from microcinema.sprites import scene

NO_MOTION = ""
"""Motion of a clip in which no object can be tracked; equal to no named motion."""

_MIN_CHROMA = 18.0  # CIELAB distance of object and background, below which there is no object; the world's pairs differ by 40 or more
_MIN_AREA = 12.0  # square scene units
_ANGLES = 240  # bins of the angular signature
_MAX_TURN = np.deg2rad(34.0)  # between neighboring frames: under half of the star's 72 degrees
_MIN_VARIATION = 0.12  # of the angular signature, relative; circles stay below 0.02 (0.06 after H.264), squares above 0.14 even when blurred
_MIN_RATIO = 0.5  # to the slowest named motion, below which the object is still
_MIN_BOUNCE_FIT = 0.6  # fraction of the vertical variance that a bounce must explain


@dataclass(frozen=True)
class Track:
    """The object in every frame, in scene units."""

    position: np.ndarray  # (f, 2), x and y
    radius: np.ndarray  # (f,), of the disk of equal area
    angle: np.ndarray  # (f,), radians clockwise since the first frame
    detected: np.ndarray  # (f,) bool; positions, radii and angles are NaN elsewhere
    uncut: np.ndarray  # (f,) bool, not cut by the border of the frame


@dataclass(frozen=True)
class Motion:
    """A named motion, with the `rates` x, y (scene units/s), turn (radians/s), scale (log radius/s), bounce (height in scene units)."""

    name: str  # one of `scene.MOTIONS`, or `NO_MOTION`
    speed: str  # one of `scene.SPEEDS`, or empty
    rates: dict[str, float]


def segment(frames: np.ndarray) -> np.ndarray:
    """Soft mask of the object, float32 (f, h, w) in [0, 1], all zero where a frame has none; `frames` uint8 (f, h, w, 3).

    The chroma of a pixel is taken as a mixture of the background's and the object's (a matte), so that edges keep their coverage.
    """
    count, height, width, _ = frames.shape
    lab = cv2.cvtColor(frames.reshape(-1, width, 3).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    chroma = lab[..., 1:].reshape(count, height, width, 2)
    difference = chroma - np.median(chroma, axis=(0, 1, 2))
    distance = np.linalg.norm(difference, axis=-1)
    strongest = np.quantile(distance.reshape(count, -1), 0.99, axis=1)
    level = np.median(strongest)
    if level < _MIN_CHROMA:
        return np.zeros((count, height, width), np.float32)
    direction = np.median(difference[distance > 0.75 * level], axis=0)
    matte = np.clip(difference @ direction / (direction @ direction), 0, 1).astype(np.float32)
    matte = np.clip((matte - 0.15) / 0.7, 0, 1)  # beyond: texture of the background, light on the object

    masks = np.zeros_like(matte)
    neighbourhood = np.ones((3, 3), bool)
    for mask, alpha in zip(masks, matte, strict=True):
        labels, num_labels = ndimage.label(alpha > 0.5, neighbourhood)
        if num_labels:
            sizes = ndimage.sum_labels(alpha, labels, np.arange(1, num_labels + 1))
            largest = ndimage.binary_dilation(labels == 1 + int(np.argmax(sizes)), neighbourhood)
            mask[:] = np.where(largest, alpha, 0)
    return masks


def _angular_signature(mask: np.ndarray, center: np.ndarray, reach: float) -> np.ndarray:
    """Mass of the mask along each direction from `center` (pixels), (_ANGLES,); the first points right, then clockwise."""
    angle = 2 * np.pi * np.arange(_ANGLES) / _ANGLES
    distance = np.arange(0.5, reach, 0.5)
    x = (center[0] + np.outer(np.cos(angle), distance)).astype(np.float32)
    y = (center[1] + np.outer(np.sin(angle), distance)).astype(np.float32)
    polar = cv2.remap(mask, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    return polar @ distance


def _turn(before: np.ndarray, after: np.ndarray) -> float:
    """Clockwise angle from signature `before` to `after`, radians: the peak of their circular correlation."""
    spectra = [np.fft.rfft(signature - signature.mean()) for signature in (before, after)]
    correlation = np.fft.irfft(spectra[1] * np.conj(spectra[0]), _ANGLES)
    limit = int(_MAX_TURN / (2 * np.pi) * _ANGLES)
    shifts = np.arange(-limit, limit + 1)
    window = correlation[shifts]
    peak = int(np.argmax(window))
    if peak in (0, len(shifts) - 1):
        return 0.0  # no peak within the limit: the outline changed rather than turned
    left, middle, right = window[peak - 1 : peak + 2]
    offset = 0.5 * (left - right) / (left - 2 * middle + right)  # vertex of the parabola through the three
    return float((shifts[peak] + offset) * 2 * np.pi / _ANGLES)


def track(frames: np.ndarray) -> Track:
    """Tracks the object through `frames` uint8 (f, h, w, 3), square."""
    masks = segment(frames)
    count, height, width = masks.shape
    unit = scene.WORLD / width
    y, x = np.mgrid[:height, :width].astype(np.float32)
    position, radius = np.full((count, 2), np.nan), np.full(count, np.nan)
    signatures = np.full((count, _ANGLES), np.nan)
    uncut = np.zeros(count, bool)
    for index, mask in enumerate(masks):
        area = float(mask.sum())
        if area * unit**2 < _MIN_AREA:
            continue
        center = np.array([(x * mask).sum() / area, (y * mask).sum() / area])
        position[index] = (center + 0.5) * unit
        radius[index] = np.sqrt(area / np.pi) * unit
        edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        uncut[index] = (edge > 0.5).sum() * unit < 2
        signatures[index] = _angular_signature(mask, center, 2.2 * np.sqrt(area / np.pi)) / area
    return Track(position, radius, _angles(signatures), ~np.isnan(radius), uncut)


def _angles(signatures: np.ndarray) -> np.ndarray:
    """Orientation (f,) since the first frame, from signatures (f, _ANGLES) with NaN rows where there is no object.

    Small turns between neighboring frames are summed, so that the symmetry of a square or a star does no harm. Zero for round outlines.
    """
    angle = np.where(np.isnan(signatures[:, 0]), np.nan, 0.0)
    rows = np.flatnonzero(~np.isnan(angle))
    if len(rows) < 2 or np.median(signatures[rows].std(axis=1) / signatures[rows].mean(axis=1)) < _MIN_VARIATION:
        return angle
    angle[rows[1:]] = np.cumsum([_turn(signatures[a], signatures[b]) for a, b in itertools.pairwise(rows)])
    return angle


def _rate(seconds: np.ndarray, values: np.ndarray, valid: np.ndarray) -> float:
    """Theil-Sen slope of `values` over time, robust to a third of outliers; 0 with fewer than three valid frames."""
    valid = valid & ~np.isnan(values)
    return float(theilslopes(values[valid], seconds[valid])[0]) if valid.sum() >= 3 else 0.0


def _explained(values: np.ndarray, fit: np.ndarray) -> float:
    """Fraction of the variance that a fit explains."""
    return 1 - float(((fit - values) ** 2).sum()) / max(float(((values - values.mean()) ** 2).sum()), 1e-9)


def _bounce(seconds: np.ndarray, height: np.ndarray) -> tuple[float, float, float]:
    """Least-squares fit of `ground + amplitude |sin(pi t / period)|`: (amplitude, period, fraction of the variance explained)."""
    best = (0.0, scene.BOUNCE_PERIOD[0], 0.0)
    for period in np.geomspace(0.75 * scene.BOUNCE_PERIOD[1], 1.3 * scene.BOUNCE_PERIOD[0], 60):
        design = np.stack([np.ones_like(seconds), np.abs(np.sin(np.pi * seconds / period))], axis=1)
        solution, *_ = np.linalg.lstsq(design, height, rcond=None)
        explained = _explained(height, design @ solution)
        if solution[1] > 0 and explained > best[2]:
            best = (float(solution[1]), float(period), explained)
    return best


def judge_motion(frames: np.ndarray, fps: float) -> Motion:
    """Names the motion of a clip, uint8 (f, h, w, 3), square; thresholds come from the world's own constants."""
    path = track(frames)
    detected, uncut = path.detected, path.detected & path.uncut
    rates = dict.fromkeys(("x", "y", "turn", "scale", "bounce"), 0.0)
    if detected.sum() < max(3, len(frames) / 2):
        return Motion(NO_MOTION, "", rates)
    if uncut.sum() < 3:
        uncut = detected  # cut by the border throughout: better a biased size than none
    seconds = np.arange(len(frames)) / fps
    rates["x"] = _rate(seconds, path.position[:, 0], detected)
    rates["y"] = _rate(seconds, path.position[:, 1], detected)
    rates["turn"] = _rate(seconds, path.angle, uncut)
    rates["scale"] = _rate(seconds, np.log(path.radius), uncut)
    times, height = seconds[detected], -path.position[detected, 1]
    amplitude, period, explained = _bounce(times, height)
    if explained > max(_MIN_BOUNCE_FIT, _explained(height, np.polyval(np.polyfit(times, height, 1), times))):
        rates["bounce"] = amplitude
    return _named(rates, period)


def _named(rates: dict[str, float], period: float) -> Motion:
    """The motion with the largest rate, relative to the slowest motion of its name; a bounce wins over its own vertical drift."""
    if rates["bounce"] / scene.BOUNCE_HEIGHT > _MIN_RATIO:
        return Motion("bouncing", scene.SPEEDS[int(period < np.sqrt(np.prod(scene.BOUNCE_PERIOD)))], rates)
    x, y, turn, scale = (rates[key] for key in ("x", "y", "turn", "scale"))
    measured = {name: (dx * x + dy * y, scene.TRANSLATION_SPEED) for name, (dx, dy) in scene.TRANSLATIONS.items()}
    measured |= {name: (sign * turn, scene.ROTATION_SPEED) for name, sign in scene.ROTATIONS.items()}
    measured |= {name: (sign * scale, scene.SCALING_SPEED) for name, sign in scene.SCALINGS.items()}
    ratio, limit, name = max(
        (rate / slow, np.sqrt(fast / slow), name) for name, (rate, (slow, fast)) in measured.items()
    )
    if ratio < _MIN_RATIO:
        return Motion("still", "", rates)
    return Motion(name, scene.SPEEDS[int(ratio > limit)], rates)  # the nearer speed on a logarithmic scale
