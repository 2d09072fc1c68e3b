import json

import numpy as np
import pytest

from benchmarks import motion_amount
from benchmarks.motion_following import started_earlier
from fixtures import tiny_training
from microcinema.pipelines.saving import save_pipeline
from microcinema.sprites import scene


def test_a_real_clip_has_the_pace_of_its_caption_and_a_faster_one_more():
    paces = []
    for sprite in motion_amount.sprites(3):
        keyframe = scene.render(sprite, 1).frames[0]
        clip = scene.render(started_earlier(sprite, 1.0)).frames
        measured = dict(
            zip(motion_amount.MEASURES, motion_amount.measure_clip(clip, sprite, keyframe, 8, 8.0), strict=True)
        )
        assert (
            measured["motion"] == 1
            and measured["psnr"] > 35
            and measured["pace"] == pytest.approx(sprite.pace, abs=0.06)
        )
        paces.append(measured["score"] / (sprite.speed == "quickly" or 0.4))
        still = np.repeat(keyframe[None], 16, axis=0)
        assert motion_amount.measure_clip(still, sprite, keyframe, 8, 8.0)[:3] == pytest.approx([0, 0, 0], abs=0.01)
    assert min(paces) > 5


def test_captions_may_leave_the_pace_open():
    sprite = motion_amount.sprites(1)[0]
    assert sprite.speed in motion_amount.captions(sprite, True, False)[1]
    for prompt in motion_amount.captions(sprite, True, True):
        assert sprite.speed not in prompt and "  " not in prompt
    assert motion_amount.captions(sprite, False, True)[1] is None


def test_a_figure_names_what_differs():
    assert motion_amount.short(["real", "real, decoded", "preset=fast motion=0.1", "preset=fast motion=0.9"]) == [
        *("real", "real, decoded", "motion=0.1", "motion=0.9")
    ]


def test_it_measures_a_model_under_several_settings(tmp_path, capsys):
    pipeline = tiny_training.pipeline(
        tmp_path / "base", network=("model.motion_score=true",), motion_quantiles=[0.0, 30.0], fps=8.0
    )
    save_pipeline(pipeline, tmp_path / "model")
    settings = ["motion=0.5 num_inference_steps=1", "start_time=0.5 initial_noise=analytic num_inference_steps=2"]
    options = ["--pipeline", str(tmp_path / "model"), "--clips", "3", "--batch-size", "2"]
    files = ["--json", str(tmp_path / "report.json"), "--figure", str(tmp_path / "figure.png")]
    assert motion_amount.main([*settings, *options, *files]) == 0
    report = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert list(report) == ["real", motion_amount.DECODED, *settings] and report[settings[0]]["asked"] == 15.0
    assert report["real"]["motion"]["value"] == 1 and report["real"]["psnr"]["low"] > 30
    assert (tmp_path / "figure.png").stat().st_size > 5000 and "| `real` |" in capsys.readouterr().out
