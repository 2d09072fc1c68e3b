"""The backgrounds of Moving Sprites: soft textures of muted colour."""

import numpy as np

from microcinema.sprites.portable_math import cos, exp, sin

WORLD = 64.0  # width and height of the scene, in scene units

_BACKGROUND_TONES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {  # (dark, light) sRGB
    "sand": ((0.74, 0.65, 0.50), (0.89, 0.82, 0.68)),
    "grass": ((0.40, 0.49, 0.34), (0.60, 0.67, 0.50)),
    "brick": ((0.55, 0.42, 0.38), (0.78, 0.73, 0.69)),
    "water": ((0.40, 0.53, 0.60), (0.68, 0.78, 0.82)),
    "wood": ((0.43, 0.34, 0.26), (0.65, 0.54, 0.43)),
    "night": ((0.07, 0.08, 0.15), (0.62, 0.63, 0.72)),
}
BACKGROUNDS = tuple(_BACKGROUND_TONES)


def _waves(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, lengths: tuple[float, float], count: int = 5
) -> np.ndarray:
    """Smooth noise of about unit variance: plane waves with wavelengths between `lengths` (scene units) in random directions."""
    total = np.zeros_like(x)
    for _ in range(count):
        direction, phase = rng.uniform(0, 2 * np.pi, 2)
        wavelength = rng.uniform(*lengths)
        total += sin(2 * np.pi / wavelength * (cos(direction) * x + sin(direction) * y) + phase)
    return total * np.sqrt(2 / count)


def _sand(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bend = 2.0 * _waves(x, y, rng, (34, 60), 3)
    ripple = sin(2 * np.pi / 11 * (y + 0.35 * x + bend) + rng.uniform(0, 2 * np.pi))
    return 0.5 + 0.24 * ripple + 0.09 * _waves(x, y, rng, (18, 40))


def _grass(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    lean = 2.2 * _waves(x, y, rng, (30, 60), 3)
    blades = sin(2 * np.pi / 8.5 * (x + lean) + 0.5 * sin(2 * np.pi / 16 * y + rng.uniform(0, 2 * np.pi)))
    return 0.48 + 0.19 * blades + 0.12 * _waves(x, y, rng, (26, 54), 4)


def _brick(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    width, height = 21.0, 10.5
    row = (y + rng.uniform(0, height)) / height
    column = (x + rng.uniform(0, width)) / width + 0.5 * (np.floor(row) % 2)
    across, along = (np.minimum(position % 1, 1 - position % 1) for position in (column, row))
    to_joint = np.minimum(width * across, height * along)  # distance to the mortar's middle, in scene units
    tone = rng.uniform(0.05, 0.42, (16, 16))[np.floor(row).astype(int) % 16, np.floor(column).astype(int) % 16]
    mortar = np.clip(1.6 - to_joint, 0, 1)
    return tone * (1 - mortar) + 0.92 * mortar


def _water(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    sway = 2.5 * _waves(x, y, rng, (22, 44), 4)
    crests = sin(2 * np.pi / 13 * (y + sway) + rng.uniform(0, 2 * np.pi))
    light = 0.34 * exp(2.2 * (crests - 1)) * (1.2 + 0.5 * _waves(x, y, rng, (24, 48), 3))
    return 0.34 + light + 0.08 * _waves(x, y, rng, (26, 60), 3)


def _wood(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    plank = (y + rng.uniform(0, 16)) / 16
    index = np.floor(plank).astype(int) % 8
    tone = rng.uniform(0.42, 0.72, 8)[index]
    shift = rng.uniform(0, 60, 8)[index]
    grain = sin(2 * np.pi / 5.3 * (y + 1.3 * sin(2 * np.pi / 38 * (x + shift)) + shift))
    gap = np.clip(1.25 - 16 * np.minimum(plank % 1, 1 - plank % 1), 0, 1)
    return (tone + 0.11 * grain + 0.05 * _waves(x, y, rng, (24, 50), 3)) * (1 - 0.85 * gap)


def _night(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    sky = 0.06 + 0.16 * y / WORLD + 0.03 * _waves(x, y, rng, (30, 60), 3)
    for _ in range(9):
        cx, cy = rng.uniform(0, WORLD, 2)
        spread = rng.uniform(0.9, 1.3)
        sky = sky + rng.uniform(0.35, 0.8) * exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * spread**2))
    return sky


_TEXTURES = {"sand": _sand, "grass": _grass, "brick": _brick, "water": _water, "wood": _wood, "night": _night}


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scene coordinates x, y (h, w) of the pixel centres of a `size` x `size` picture."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(WORLD / size)
    x, y = np.meshgrid(centres, centres)
    return x, y


def background(name: str, variation: int, size: int) -> np.ndarray:
    """The background `name`, float32 (size, size, 3) sRGB in [0, 1]; `variation` seeds its texture."""
    x, y = grid(size)
    rng = np.random.default_rng(variation)
    shade = np.clip(_TEXTURES[name](x, y, rng), 0, 1)[..., None]
    dark, light = (np.asarray(tone, np.float32) for tone in _BACKGROUND_TONES[name])
    vignette = 1 - 0.10 * (((x - 32) ** 2 + (y - 32) ** 2) / 2048)[..., None]
    return ((dark + (light - dark) * shade) * vignette).astype(np.float32)
