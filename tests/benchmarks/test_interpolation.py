"""Interpolation of held-out clips: on real frames, on neighbors whose figures are known, and by a pipeline."""

import json

import numpy as np
import pytest

from benchmarks import interpolation, sprites
from fixtures import tiny
from microcinema.evaluation.video_metrics import psnr
from microcinema.pipelines.saving import save_pipeline
from microcinema.sprites import scene
from microcinema.utils.errors import UserError


def test_sprites_move_and_are_held_out():
    shown = interpolation.moving_sprites(12)
    assert interpolation.moving_sprites(5) == shown[:5] and "still" not in {sprite.motion for sprite in shown}
    assert any(sprite.motion.endswith("clockwise") for sprite in shown)


def test_places_are_within_a_clip_of_the_model():
    assert interpolation.places_of(16, 4) == {"every 4 frames": [0, 4, 8, 12], "first and last": [0, 15]}
    for factor in (1, 16):
        with pytest.raises(UserError, match=f"factor is {factor}, and the model's clips have 16 frames"):
            interpolation.places_of(16, factor)


def test_neighbors_are_repeated_and_blended_by_nearness():
    keyframes = np.array([0, 40, 100], dtype=np.uint8).reshape(3, 1, 1, 1)
    places = [0, 4, 6]
    repeated, blended = (interpolation.from_neighbors(keyframes, places, blend).ravel() for blend in (False, True))
    assert repeated.tolist() == [0, 0, 0, 40, 40, 40, 100]
    assert blended.tolist() == [0, 10, 20, 30, 40, 70, 100]


def test_figures_are_of_frames_that_are_no_key_frames_and_of_pixels_that_move():
    shown, places = interpolation.moving_sprites(3), [0, 2, 4]

    def spoilt(sprite, real, places):
        assert real.shape == (5, 64, 64, 3)
        made = real.copy()
        made[places] = 0  # does not count
        made[1, :4, :4] ^= 16  # a corner, where nothing moves
        return made

    made = {
        "real": lambda _, real, __: real,
        "spoilt": spoilt,
        "repeat": lambda _, real, places: interpolation.from_neighbors(real[places], places, False),
        "blend": lambda _, real, places: interpolation.from_neighbors(real[places], places, True),
    }
    found = interpolation.measure(made, shown, places, 64, 8.0)
    assert found["real"] == {"psnr": 60.0, "moving_psnr": 60.0}
    noise = np.zeros((2, 64, 64, 3), np.uint8)
    noise[0, :4, :4] = 16
    assert found["spoilt"]["psnr"] == pytest.approx(psnr(noise, np.zeros_like(noise)), abs=1.0)
    assert found["spoilt"]["moving_psnr"] == 60.0
    assert 60 > found["blend"]["moving_psnr"] > found["repeat"]["moving_psnr"] + 1
    assert found["blend"]["psnr"] > found["blend"]["moving_psnr"]
    with pytest.raises(UserError, match="no sprites"):
        interpolation.measure(made, [], places, 64, 8.0)


def test_the_command_measures_a_model_of_places_and_refuses_others(tmp_path, capsys):
    for name, changes in (("places", ("model.keyframe_places=true", "keyframe_places=0.5")), ("own", ())):
        save_pipeline(tiny.video_pipeline(tmp_path / "base", changes=changes), tmp_path / name, with_base=False)
    options = ["--clips", "1", "--num-inference-steps", "1", "--guidance-scale", "1", "--fps", "16"]
    report = ["--json", str(tmp_path / "report.json")]
    assert sprites.main([*report, "interpolation", "--pipeline", str(tmp_path / "places"), *options]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["fps"] == 16 and found["every 2 frames"].keys() == {"model", "repeat", "blend", "vae"}
    assert "first and last, model" in capsys.readouterr().out
    assert sprites.main(["interpolation", "--pipeline", str(tmp_path / "own"), *options]) == 2
    assert "was trained for frame 0 alone" in capsys.readouterr().err


def test_the_vae_limits_neighbors_as_it_limits_the_model(tmp_path):
    pipeline = tiny.video_pipeline(tmp_path / "base")
    (sprite,) = interpolation.moving_sprites(1)
    real = scene.render(sprite, 3, 32, 8.0).frames
    made = interpolation.makers(pipeline, 8.0)
    frames = made["vae"](sprite, real, [0, 2])
    assert np.array_equal(made["repeat"](sprite, real, [0, 2])[[0, 2]], frames[[0, 2]])
    assert not np.array_equal(frames, real)
