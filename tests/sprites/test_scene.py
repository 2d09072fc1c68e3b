"""Moving Sprites: what is drawn is what is said, and the truth is true."""

import dataclasses

import cv2
import numpy as np
import pytest

from microcinema.data.clips import ClipDataset
from microcinema.sprites import dataset, scene
from microcinema.utils.errors import UserError


def example(motion: str = "left", speed: str = "quickly", shape: str = "star", **changes: float) -> scene.Sprite:
    drawn = scene.place(
        np.random.default_rng(3), shape, "red", "large", "sand", motion, "" if motion == "still" else speed
    )
    return dataclasses.replace(drawn, **changes)


def test_a_clip_follows_from_seed_and_index():
    first, again = (scene.render(scene.sample_attributes(5, 7)) for _ in range(2))
    assert np.array_equal(first.frames, again.frames)
    assert scene.sample_attributes(5, 7) != scene.sample_attributes(5, 8)
    assert scene.sample_attributes(5, 7) != scene.sample_attributes(6, 7)


def test_held_out_pairs_are_never_in_training_and_cover_every_shape_and_colour():
    seen = {(s.shape, s.colour) for s in (scene.sample_attributes(0, i) for i in range(2000))}
    held = {(s.shape, s.colour) for s in (scene.sample_attributes(0, i, "heldout") for i in range(300))}
    assert held == scene.HELD_OUT
    assert seen | held == {(s, c) for s in scene.SHAPES for c in scene.COLOURS} and not seen & held
    assert {s for s, _ in held} == set(scene.SHAPES) and {c for _, c in held} == set(scene.COLOURS)
    with pytest.raises(UserError, match="split 'test'"):
        scene.sample_attributes(0, 0, "test")


def test_every_motion_is_drawn_and_a_circle_never_turns():
    drawn = [scene.sample_attributes(1, i) for i in range(1500)]
    assert {s.motion for s in drawn} == set(scene.MOTIONS)
    assert not any(s.shape == "circle" and s.motion in scene.ROTATIONS for s in drawn)
    assert all((s.speed == "") == (s.motion == "still") for s in drawn)


def test_rotations_can_be_drawn_more_often():
    drawn = [scene.sample_attributes(1, i, rotation_weight=4) for i in range(1500)]
    turning = [s.motion for s in drawn if s.shape != "circle" and s.motion in scene.ROTATIONS]
    share = len(turning) / sum(s.shape != "circle" for s in drawn)
    assert share == pytest.approx(2 * 4 / (2 * 4 + len(scene.MOTIONS) - 2), abs=0.05)
    assert {s.motion for s in drawn if s.shape == "circle"} == set(scene.MOTIONS) - set(scene.ROTATIONS)


def test_captions():
    sprite = example("left")
    assert scene.combined_caption(sprite) == "a large red star moving quickly to the left on sand"
    assert scene.caption(sprite) == "a large red star on sand"
    assert scene.motion_caption(sprite) == "moving quickly to the left"
    assert scene.motion_caption(example("up", "slowly")) == "moving slowly up"
    assert scene.motion_caption(example("clockwise")) == "rotating quickly clockwise"
    assert scene.motion_caption(example("still")) == "staying still"
    assert scene.motion_caption(example("bouncing", "slowly")) == "bouncing slowly"


def test_object_starts_whole_and_stays_in_sight():
    for index in range(120):
        sprite = scene.sample_attributes(2, index)
        masks = scene.render(sprite, num_frames=2, fps=8 / 15).masks  # the first and the last of 16 frames at 8 fps
        border = max(masks[0, 0].max(), masks[0, -1].max(), masks[0, :, 0].max(), masks[0, :, -1].max())
        assert border == 0, sprite
        assert masks[-1].sum() > 0.5 * np.pi * 3**2, sprite


def test_motion_is_in_seconds_not_frames():
    for motion in scene.MOTIONS:
        slow, fast = scene.render(example(motion), 4, fps=8), scene.render(example(motion), 7, fps=16)
        assert np.array_equal(slow.frames, fast.frames[::2])


def test_flow_of_a_translation_is_its_speed():
    sprite = example("left", pace=1.0)
    rendered = scene.render(sprite, fps=8)
    inside = rendered.masks[:-1] > 0.5
    expected = -scene.TRANSLATION_SPEED[1] / 8
    assert np.allclose(rendered.flow[inside], [expected, 0], atol=1e-4)
    assert not rendered.flow[~inside].any()
    doubled = scene.render(sprite, size=128, fps=8)
    assert np.allclose(doubled.flow[doubled.masks[:-1] > 0.5], [2 * expected, 0], atol=2e-4)


@pytest.mark.parametrize("motion", [m for m in scene.MOTIONS if m != "still"])
def test_flow_leads_each_pixel_of_the_object_to_the_object(motion):
    rendered = scene.render(example(motion, x=32.0, y=36.0), size=128)
    rows, columns = np.mgrid[0:128, 0:128].astype(np.float32)
    for now in range(15):
        there = columns + rendered.flow[now, ..., 0], rows + rendered.flow[now, ..., 1]
        later = cv2.remap(rendered.masks[now + 1], *there, cv2.INTER_LINEAR)
        in_sight = np.logical_and.reduce([(axis > 1) & (axis < 126) for axis in there])
        wholly_inside = (cv2.erode(rendered.masks[now], np.ones((5, 5))) == 1) & in_sight
        assert wholly_inside.sum() > 50
        assert later[wholly_inside].min() > 0.99


def test_rotation_and_scaling_have_their_closed_forms():
    turning = scene.poses(example("clockwise", pace=1.0, angle=0.0), np.array([0.0, 0.5]))
    assert turning[1, 3] == pytest.approx(np.deg2rad(60))
    growing = scene.poses(example("growing", "slowly", pace=1.0, radius=10.0), np.array([0.0, 2.0]))
    assert growing[1, 2] == pytest.approx(10 * 1.15**2)
    bouncing = scene.poses(example("bouncing", pace=1.0, y=40.0), np.array([0.0, 0.4, 0.8]))
    assert bouncing[:, 1] == pytest.approx([40, 40 - scene.BOUNCE_HEIGHT, 40])


def test_objects_are_saturated_and_backgrounds_muted():
    for index in range(60):
        rendered = scene.render(scene.sample_attributes(4, index), num_frames=1)
        pixels = rendered.frames[0].astype(float) / 255
        chroma = pixels.max(-1) - pixels.min(-1)
        inside = cv2.erode(rendered.masks[0], np.ones((5, 5))) == 1
        assert chroma[inside].min() > 0.4 > 0.3 > chroma[rendered.masks[0] == 0].max()


def test_the_picture_does_not_depend_on_the_resolution():
    sprite = example("clockwise")
    small, large = scene.render(sprite, 1).frames[0], scene.render(sprite, 1, size=256).frames[0]
    shrunk = cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(shrunk.astype(int) - small).mean() < 2


def test_on_disk_it_is_a_data_set_like_any_other(tmp_path):
    folder = dataset.write_dataset(tmp_path / "sprites", 5, seed=9, progress=False)
    clips = ClipDataset(
        str(folder / "clips.csv"), str(folder), num_frames=16, fps=8, resolution=64, clip_position="first"
    )
    assert len(clips) == 5
    for item, (video_id, sprite, num_frames, size, fps) in zip(clips, dataset.read_truth(folder), strict=True):
        assert item["id"] == video_id
        assert item["caption"] == scene.combined_caption(sprite)
        assert item["description"] == scene.caption(sprite)
        assert item["motion"] == scene.motion_caption(sprite)
        truth = scene.render(sprite, num_frames, size, fps)
        read = item["video"].permute(0, 2, 3, 1).double().numpy()
        assert 10 * np.log10(255**2 / np.square(read - truth.frames).mean()) > 33  # what H.264 loses


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="num_frames=0"):
        scene.render(example(), num_frames=0)
    with pytest.raises(UserError, match=r"truth\.jsonl"):
        next(dataset.read_truth(tmp_path))
