"""Moving Sprites: a small rendered world of captioned clips with ground truth.

One object (shape, colour, size) with one named motion and speed on one textured background. The scene is 64 units wide and high, x points
right, y down, angles are clockwise. (seed, index) determine a clip, and the ground truth (attributes, masks, optical flow) is exact.
Objects are saturated and backgrounds muted, so that an object can be tracked without a network.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from microcinema.sprites.backgrounds import BACKGROUNDS, WORLD, background, grid
from microcinema.sprites.portable_math import cos, exp, sin
from microcinema.utils.errors import UserError

COLOURS: dict[str, tuple[float, float, float]] = {  # sRGB in [0, 1]
    "red": (0.91, 0.15, 0.17),
    "orange": (0.98, 0.53, 0.07),
    "yellow": (0.98, 0.87, 0.13),
    "green": (0.12, 0.70, 0.24),
    "blue": (0.14, 0.36, 0.93),
    "purple": (0.60, 0.20, 0.82),
}
SIZES: dict[str, float] = {"small": 9.5, "large": 14.0}  # radius at the start, in scene units
SPEEDS = ("slowly", "quickly")
TRANSLATIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ROTATIONS: dict[str, int] = {"clockwise": 1, "counterclockwise": -1}
SCALINGS: dict[str, int] = {"growing": 1, "shrinking": -1}
MOTIONS = ("still", *TRANSLATIONS, *ROTATIONS, *SCALINGS, "bouncing")

# Motion is defined in seconds, so that it does not depend on the frame rate. Each value is (slowly, quickly).
TRANSLATION_SPEED = (5.0, 13.0)  # scene units per second
ROTATION_SPEED = (np.deg2rad(45.0), np.deg2rad(120.0))  # radians per second
SCALING_SPEED = (0.13976194237515863, 0.27763173659827955)  # change of log radius per second: log 1.15, log 1.32
BOUNCE_PERIOD = (1.6, 0.8)  # seconds from ground to ground
BOUNCE_HEIGHT = 12.0  # scene units
_NOMINAL_DURATION = 15 / 8  # seconds; the start leaves room for a motion of this length

# One shape and one colour each: seen in training apart, never together.
_HELD_OUT_COLOURS = ("blue", "purple", "red", "orange", "yellow", "green")
HELD_OUT = frozenset(zip(("circle", "square", "triangle", "star", "heart", "moon"), _HELD_OUT_COLOURS, strict=True))


@dataclass(frozen=True)
class Sprite:
    """All attributes of one clip. Positions are in scene units, `variation` seeds the background's texture."""

    shape: str
    colour: str
    size: str
    background: str
    motion: str
    speed: str  # empty for a still object
    x: float
    y: float
    radius: float
    angle: float  # radians, at the start
    pace: float  # factor on the named speed
    variation: int


@dataclass(frozen=True)
class Rendered:
    """A clip and its ground truth."""

    frames: np.ndarray  # uint8 (f, h, w, 3)
    masks: np.ndarray  # float32 (f, h, w), the object's coverage of each pixel
    flow: np.ndarray  # float32 (f-1, h, w, 2), forward (dx, dy) in pixels, zero outside the object


def _polygon_distance(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Exact signed distance to a simple polygon with the given `corners` (n, 2)."""
    nearest = np.full(x.shape, np.inf, x.dtype)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        crosses = (ay > y) != (by > y)
        if ey != 0:
            inside ^= crosses & (x < ax + ex * (y - ay) / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _regular_corners(radii: tuple[float, ...], points: int) -> np.ndarray:
    """`points * len(radii)` corners around the centre, the first at the top, their radii cycling through `radii`."""
    count = points * len(radii)
    angle = 2 * np.pi * np.arange(count) / count - np.pi / 2
    radius = np.resize(np.asarray(radii), count)
    return np.stack([radius * cos(angle), radius * sin(angle)], axis=1).astype(np.float32)


_TRIANGLE = _regular_corners((1.0,), 3) + np.asarray([0.0, 0.12], np.float32)
_SQUARE = np.asarray([[-0.7, -0.7], [0.7, -0.7], [0.7, 0.7], [-0.7, 0.7]], np.float32)
_STAR = _regular_corners((1.0, 0.46), 5)


def _heart_corners() -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    sine = sin(angle)
    x = 16 * (sine * sine * sine)
    y = -(13 * cos(angle) - 5 * cos(2 * angle) - 2 * cos(3 * angle) - cos(4 * angle))
    return np.stack([x / 16.5, (y - 2.0) / 16.5], axis=1).astype(np.float32)


_HEART = _heart_corners()


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x.astype(np.float64) ** 2 + y.astype(np.float64) ** 2).astype(x.dtype)


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = x - 0.16  # puts the crescent's middle near the centre of rotation
    return np.maximum(_distance(x, y) - 0.98, 0.80 - _distance(x - 0.52, y + 0.12))


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # signed distance in radii, negative inside
    "circle": lambda x, y: _distance(x, y) - 0.86,
    "square": lambda x, y: _polygon_distance(x, y, _SQUARE) - 0.06,
    "triangle": lambda x, y: _polygon_distance(x, y, _TRIANGLE) - 0.05,
    "star": lambda x, y: _polygon_distance(x, y, _STAR) - 0.05,
    "heart": lambda x, y: _polygon_distance(x, y, _HEART),
    "moon": _moon,
}


def poses(sprite: Sprite, times: np.ndarray) -> np.ndarray:
    """The object's pose (x, y, radius, angle) at each of `times` (seconds), shape (len(times), 4)."""
    x, y, radius, angle = (np.full(len(times), value) for value in (sprite.x, sprite.y, sprite.radius, sprite.angle))
    seconds = np.asarray(times, np.float64) * sprite.pace
    speed = SPEEDS.index(sprite.speed) if sprite.speed else 0
    if sprite.motion in TRANSLATIONS:
        dx, dy = TRANSLATIONS[sprite.motion]
        distance = TRANSLATION_SPEED[speed] * seconds
        x, y = x + dx * distance, y + dy * distance
    elif sprite.motion in ROTATIONS:
        angle = angle + ROTATIONS[sprite.motion] * ROTATION_SPEED[speed] * seconds
    elif sprite.motion in SCALINGS:
        radius = radius * exp(SCALINGS[sprite.motion] * SCALING_SPEED[speed] * seconds)
    elif sprite.motion == "bouncing":
        y = y - BOUNCE_HEIGHT * np.abs(sin(np.pi * seconds / BOUNCE_PERIOD[speed]))
    return np.stack([x, y, radius, angle], axis=1)


def sample_attributes(seed: int, index: int, split: str = "train", rotation_weight: int = 1) -> Sprite:
    """The sprite of clip number `index` of the world with this `seed`.

    Args:
        split: `train` excludes the pairs of `HELD_OUT`, `heldout` has no others.
        rotation_weight: at least 1, how many times as often each rotation is drawn as each other motion, since models learn rotation last.

    Raises:
        UserError: unknown split.
    """
    if split not in ("train", "heldout"):
        raise UserError(f"unknown split '{split}' of Moving Sprites; choose train or heldout")
    rng = np.random.default_rng([seed, index, split == "heldout"])

    def choice(names: object) -> str:
        return str(rng.choice(list(names)))  # type: ignore[call-overload]

    pairs = [(s, c) for s in SHAPES for c in COLOURS if ((s, c) in HELD_OUT) == (split == "heldout")]
    shape, colour = pairs[rng.integers(len(pairs))]
    # A turning circle looks like a still one.
    weights = {m: rotation_weight * (shape != "circle") if m in ROTATIONS else 1 for m in MOTIONS}
    motion = choice(m for m in MOTIONS for _ in range(weights[m]))
    size, ground = choice(SIZES), choice(BACKGROUNDS)
    return place(rng, shape, colour, size, ground, motion, "" if motion == "still" else choice(SPEEDS))


def place(
    rng: np.random.Generator, shape: str, colour: str, size: str, background: str, motion: str, speed: str
) -> Sprite:
    """A sprite with these attributes at a random position: whole at the start, its center well inside at the end of its motion."""
    radius = SIZES[size] * rng.uniform(0.94, 1.06)
    pace = rng.uniform(0.9, 1.1)
    low, high = np.full(2, radius + 1.5), np.full(2, WORLD - radius - 1.5)
    angle, variation = rng.uniform(-0.12, 0.12), int(rng.integers(2**31))
    names = (shape, colour, size, background, motion, speed)
    sprite = Sprite(*names, x=0.0, y=0.0, radius=radius, angle=angle, pace=pace, variation=variation)
    x, y, last_radius, _ = poses(sprite, np.array([_NOMINAL_DURATION]))[0]
    if motion in TRANSLATIONS:
        travel, margin = np.array([x, y]), 8.0
        low, high = np.maximum(low, margin - travel), np.minimum(high, WORLD - margin - travel)
    elif motion == "bouncing":
        low[1] += BOUNCE_HEIGHT
    else:
        room = max(0.9 * last_radius, radius + 1.5)
        low, high = np.full(2, room), np.full(2, WORLD - room)
    x, y = rng.uniform(low, high).tolist()
    return dataclasses.replace(sprite, x=x, y=y)


def caption(sprite: Sprite) -> str:
    """The descriptive caption, for the key frame: `a large red star on sand`."""
    return f"a {sprite.size} {sprite.colour} {sprite.shape} on {sprite.background}"


def motion_caption(sprite: Sprite) -> str:
    """The concise motion caption: `moving quickly to the left`."""
    if sprite.motion == "still":
        return "staying still"
    if sprite.motion in TRANSLATIONS:
        where = f"to the {sprite.motion}" if sprite.motion in ("left", "right") else sprite.motion
        return f"moving {sprite.speed} {where}"
    if sprite.motion in ROTATIONS:
        return f"rotating {sprite.speed} {sprite.motion}"
    return f"{sprite.motion} {sprite.speed}"


def combined_caption(sprite: Sprite) -> str:
    """Both in one sentence, as a video data set would have it: `a large red star moving quickly to the left on sand`."""
    return f"a {sprite.size} {sprite.colour} {sprite.shape} {motion_caption(sprite)} on {sprite.background}"


def _to_object(x: np.ndarray, y: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scene coordinates (h, w) to object coordinates (f, h, w), in units of the radius, for `pose` (f, 4)."""
    cx, cy, radius, angle = (pose[:, i, None, None].astype(np.float32) for i in range(4))
    dx, dy = (x - cx) / radius, (y - cy) / radius
    return cos(angle) * dx + sin(angle) * dy, cos(angle) * dy - sin(angle) * dx


def render(sprite: Sprite, num_frames: int = 16, size: int = 64, fps: float = 8.0) -> Rendered:
    """Renders the clip, `size` pixels wide and high, and its truth, the same on every processor. A UserError if the number of frames, the
    size or the frame rate is not positive."""
    if num_frames < 1 or size < 1 or not fps > 0:
        raise UserError(f"num_frames={num_frames}, size={size}, fps={fps}: all three must be positive")
    x, y = grid(size)
    pixel = np.float32(WORLD / size)
    pose = poses(sprite, np.arange(num_frames) / fps)
    radius = pose[:, 2, None, None].astype(np.float32)
    signed_distance = SHAPES[sprite.shape]
    distance = signed_distance(*_to_object(x, y, pose)) * radius  # scene units
    masks = np.clip(0.5 - distance / pixel, 0, 1)

    # The shadow falls to the lower right, whatever the object's angle.
    shadow_distance = signed_distance(*_to_object(x - 1.3, y - 1.9, pose)) * radius
    shadow = 0.42 * np.clip(0.5 - shadow_distance / 3.6, 0, 1)
    frames = background(sprite.background, sprite.variation, size)[None] * (1 - shadow[..., None])

    # Light from the upper left, a darker rim, a brighter body.
    lit = np.clip(0.5 - 0.35 * ((x - pose[:, 0, None, None]) + (y - pose[:, 1, None, None])) / radius, 0, 1)[..., None]
    rim = np.clip(1 + (distance + 0.4) / 1.6, 0, 1)[..., None]
    colour = np.asarray(COLOURS[sprite.colour], np.float32)
    body = (colour * (0.80 + 0.20 * lit) + 0.16 * lit**2 * (1 - colour)) * (1 - 0.40 * rim)
    frames = frames + masks[..., None] * (body - frames)
    pixels = (np.clip(frames, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Rendered(pixels, masks.astype(np.float32), _flow(pose, masks, x, y, pixel))


def _flow(pose: np.ndarray, masks: np.ndarray, x: np.ndarray, y: np.ndarray, pixel: np.floating) -> np.ndarray:
    """Forward flow (f-1, h, w, 2): where the object's material at each pixel is one frame later."""
    ox, oy = _to_object(x, y, pose[:-1])
    cx, cy, radius, angle = (pose[1:, i, None, None] for i in range(4))
    later_x = cx + radius * (cos(angle) * ox - sin(angle) * oy)
    later_y = cy + radius * (sin(angle) * ox + cos(angle) * oy)
    flow = np.stack([later_x - x, later_y - y], axis=-1) / pixel
    return np.where(masks[:-1, ..., None] > 0.5, flow, 0).astype(np.float32)
