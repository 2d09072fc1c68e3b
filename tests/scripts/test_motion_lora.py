import csv

import numpy as np
import pytest

from microcinema.sprites import scene
from scripts.recipes.motion_lora import NUM_FRAMES, Recipe, is_zigzag, path_error, render, write_clips, zigzag


@pytest.mark.slow
def test_only_a_zigzag_is_one():
    """Of real clips: those of the recipe, none of another motion, and none that has one half of it."""
    rng = np.random.default_rng(0)
    for sprite, pose in (zigzag(rng, "heldout") for _ in range(4)):
        frames = render(sprite, pose)
        assert frames.shape == (NUM_FRAMES, 64, 64, 3) and is_zigzag(frames)
        assert path_error(frames, pose) < 4 < path_error(frames[:1].repeat(NUM_FRAMES, 0), pose)
        for axis in (0, 1):
            half = pose.copy()
            half[:, axis] = pose[0, axis]
            assert not is_zigzag(render(sprite, half))
        assert not is_zigzag(render(sprite, pose)[::-1]) and not is_zigzag(frames[rng.permutation(NUM_FRAMES)])
    for motion in scene.MOTIONS:
        speed = "" if motion == "still" else "quickly"
        assert not is_zigzag(scene.render(scene.place(rng, "star", "red", "large", "sand", motion, speed)).frames)


def test_objects_of_the_tests_are_not_in_training(tmp_path):
    write_clips(tmp_path, Recipe(clips=3, known_clips=2))
    with open(tmp_path / "clips.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["motion"] == "zigzag to the right" for row in rows] == [True] * 3 + [False] * 2
    assert all((tmp_path / row["file"]).is_file() for row in rows)
    pairs = {tuple(row["description"].split()[2:4][::-1]) for row in rows}
    assert not pairs & scene.HELD_OUT
    rng = np.random.default_rng(1)
    assert all(
        (sprite.shape, sprite.colour) in scene.HELD_OUT for sprite, _ in (zigzag(rng, "heldout") for _ in range(9))
    )
