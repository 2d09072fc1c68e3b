"""The measurements on Moving Sprites: options, and short runs of the embedded models."""

import json

import numpy as np
import pytest

from benchmarks import long_video, motion_following, sprites
from microcinema.pipelines.saving import load_pipeline
from microcinema.sprites import scene


def test_long_video_passes_its_options_on(tmp_path, monkeypatch, capsys):
    options = {}

    def makers(pipeline, **settings):
        options.update(settings, frames=pipeline.config["num_frames"])
        return {"real": lambda sprite, keyframe: scene.render(sprite, 31, 64, 8.0).frames}

    monkeypatch.setattr(long_video, "makers", makers)
    path = tmp_path / "figures.json"
    arguments = ["--prompts", "2", "--num-segments", "2", "--num-inference-steps", "3", "--guidance-scale", "1.5"]
    assert sprites.main(["--json", str(path), "long_video", *arguments, "--window-overlap", "4", "--seed", "7"]) == 0
    settings = {"num_segments": 2, "num_inference_steps": 3, "guidance_scale": 1.5, "window_overlap": 4, "seed": 7}
    assert options == {**settings, "frames": 16}
    report = json.loads(path.read_text())
    assert report | settings == report
    assert [set(row) for row in report["drift"]["real"]] == [{"object", "background_psnr"}] * 2
    assert "object as asked for" in capsys.readouterr().out


def test_long_video_says_that_it_leaves_continuation_out(tmp_path, monkeypatch, capsys):
    """And measures windows from the real frame at the place of the key frame."""
    pipeline = load_pipeline("sprites-microcinema")
    pipeline.register_to_config(keyframe_position="center")
    monkeypatch.setattr(sprites, "load_pipeline", lambda name: pipeline)
    path, asked = tmp_path / "figures.json", {}
    measure = long_video.measure
    monkeypatch.setattr(long_video, "measure", lambda *args: asked.update(place=args[4:]) or measure(*args))
    options = ["--prompts", "1", "--num-segments", "2", "--num-inference-steps", "1", "--guidance-scale", "1"]
    assert sprites.main(["--json", str(path), "long_video", *options]) == 0
    assert list(json.loads(path.read_text())["drift"]) == ["real", "windows"]
    assert asked["place"] == (15, 8.0)  # of 31 frames in three windows
    assert "continuation is not measured: this model's key frame is not the first" in capsys.readouterr().out


@pytest.mark.slow
def test_long_videos_of_the_embedded_model_drift(tmp_path):
    path = tmp_path / "figures.json"
    options = ["--prompts", "1", "--num-segments", "2", "--num-inference-steps", "2", "--guidance-scale", "1"]
    sprites.main(["--json", str(path), "long_video", *options])
    drift = json.loads(path.read_text())["drift"]
    assert {name: len(rows) for name, rows in drift.items()} == {"real": 2, "continuation": 2, "windows": 2}
    assert drift["real"][1]["background_psnr"] > drift["continuation"][1]["background_psnr"]


def test_motion_following_reports_the_model_beside_real_clips(tmp_path, monkeypatch, capsys):
    def still_maker(pipeline, **settings):
        return lambda scenes, keyframe: np.stack([np.repeat(keyframe[None], 16, axis=0)] * len(scenes))

    monkeypatch.setattr(motion_following, "pipeline_maker", still_maker)
    path = tmp_path / "figures.json"
    assert sprites.main(["--json", str(path), "motion_following", "--keyframes", "1", "--guidance-scale", "1"]) == 0
    report = json.loads(path.read_text())
    assert report["real"]["motion"]["value"] > report["model"]["motion"]["value"]  # one motion at most is right
    assert (report["keyframes"], report["num_inference_steps"], report["guidance_scale"]) == (1, 25, 1.0)
    assert capsys.readouterr().out.startswith("model")
