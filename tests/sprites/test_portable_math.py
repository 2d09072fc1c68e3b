"""Nothing of the embedded world depends on the processor: not its mathematics, its pixels, its identifiers or its files."""

import hashlib
import itertools
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from microcinema.sprites import portable_math, scene
from microcinema.sprites.backgrounds import BACKGROUNDS
from microcinema.sprites.dataset import write_dataset
from microcinema.sprites.protocol import SpritesProtocol

EPS = np.finfo(np.float64).eps


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sines_are_right_to_the_last_places(name: str):
    angles = np.concatenate([np.random.default_rng(0).uniform(-1000, 1000, 10_000), np.arange(-8, 9) * math.pi / 4])
    expected = [getattr(math, name)(angle) for angle in angles]
    assert np.abs(getattr(portable_math, name)(angles) - expected).max() <= 2 * EPS


def test_the_exponential_is_right_to_the_last_places():
    values = np.random.default_rng(0).uniform(-50, 50, 10_000)
    expected = np.array([math.exp(value) for value in values])
    assert (np.abs(portable_math.exp(values) - expected) / expected).max() <= 2 * EPS


def test_the_type_of_the_argument_is_kept_and_integers_are_numbers():
    for function in (portable_math.sin, portable_math.cos, portable_math.exp):
        assert function(np.ones(3, np.float32)).dtype == np.float32
        assert function(np.ones(3)).dtype == np.float64
        assert function(1) == function(1.0)


def print_world() -> None:
    """Identifiers, and hashes of rendered clips with their truth and of a written data set."""
    print(SpritesProtocol().identifier, SpritesProtocol(3, 2, 1, num_frames=8).identifier)
    digest = hashlib.sha256()
    for number, names in enumerate(itertools.product(scene.SHAPES, BACKGROUNDS, scene.MOTIONS)):
        shape, background, motion = names
        rng = np.random.default_rng(number)
        colour, size = list(scene.COLOURS)[number % 6], list(scene.SIZES)[number % 2]
        speed = "" if motion == "still" else scene.SPEEDS[number // 2 % 2]
        sprite = scene.place(rng, shape, colour, size, background, motion, speed)
        rendered = scene.render(sprite, num_frames=3, fps=2)
        for array in (rendered.frames, rendered.masks, rendered.flow):
            digest.update(array.tobytes())
        digest.update(repr(sprite).encode())
    print(digest.hexdigest())
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "world", 6, progress=False)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        print(hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest())


@pytest.mark.slow
def test_identifiers_frames_and_files_do_not_depend_on_the_instruction_set():
    extensions = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    if not extensions:
        pytest.skip("this processor has no instruction set that NumPy could do without")
    outputs = []
    for disabled in ("", " ".join(extensions)):
        environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled}
        process = subprocess.run(
            [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
        )
        assert process.returncode == 0, process.stderr
        outputs.append(process.stdout)
    assert outputs[0].startswith("sprites-3-") and outputs[0] == outputs[1]


if __name__ == "__main__":
    print_world()
