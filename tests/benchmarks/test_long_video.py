"""Drift of long videos: measured on real ones, on ones that are spoilt on purpose, and on those of a pipeline."""

import dataclasses

import numpy as np
import pytest

from benchmarks import long_video
from fixtures import tiny
from microcinema.sprites import scene
from microcinema.sprites.judge import SpriteJudge
from microcinema.utils.errors import UserError

SIZE, LENGTH = 64, 16


@pytest.fixture(scope="module")
def judge():
    return SpriteJudge.load("sprites-classifier")


def real(sprite, frames=LENGTH):
    return scene.render(sprite, frames, SIZE, 8.0).frames


def test_the_sprites_stay_in_view_and_a_short_measurement_is_the_beginning_of_a_long_one():
    shown = long_video.lasting_sprites(12)
    assert {sprite.motion for sprite in shown} == set(long_video.MOTIONS)
    assert long_video.lasting_sprites(5) == shown[:5]
    for sprite in shown:
        x, y, radius, _ = scene.poses(sprite, np.arange(200) / 8).T
        assert min((x - radius).min(), (y - radius).min()) > -2
        assert max((x + radius).max(), (y + radius).max()) < scene.WORLD + 2


def test_background_psnr_is_of_the_background_alone():
    sprite = next(s for s in long_video.lasting_sprites(40) if s.motion == "bouncing" and s.background != "night")
    frames = real(sprite)
    assert long_video.background_psnr(frames, frames[0]) > 50
    # Another colour before the same background changes nothing, another brightness of the background what its size says.
    other = real(dataclasses.replace(sprite, colour="purple" if sprite.colour != "purple" else "red"))
    assert long_video.background_psnr(other, frames[0]) > 50
    assert long_video.background_psnr(frames + np.uint8(8), frames[0]) == pytest.approx(20 * np.log10(255 / 8), abs=0.5)


def test_figures_are_those_of_each_clip(judge):
    shown = long_video.lasting_sprites(4)
    fade = np.repeat([0.0, 0.0, 0.5, 1.0], [LENGTH, LENGTH - 1, LENGTH - 1, LENGTH - 1])[:, None, None, None]

    def perfect(sprite, keyframe):
        assert np.array_equal(keyframe, real(sprite, 1)[0])
        return real(sprite, 4 * (LENGTH - 1) + 1)

    def fading(sprite, keyframe):
        return np.rint((1 - fade) * perfect(sprite, keyframe) + fade * 128).astype(np.uint8)

    found = long_video.measure({"perfect": perfect, "fading": fading}, shown, judge, SIZE)
    assert {kind: len(rows) for kind, rows in found.items()} == {"perfect": 4, "fading": 4}
    assert all(row["object"] == 1 and row["background_psnr"] > 50 for row in found["perfect"])
    assert found["fading"][:2] == found["perfect"][:2]
    psnr = [row["background_psnr"] for row in found["fading"]]
    assert psnr[1] > psnr[2] + 10 and psnr[2] > psnr[3] + 3
    assert found["fading"][3]["object"] == 0
    table = long_video.text_table(found).splitlines()
    assert len(table) == 5
    assert table[1].split() == ["perfect,", "object", "as", "asked", "for", "100%", "100%", "100%", "100%"]
    assert table[-1].startswith("fading, background, dB")


def test_a_pipeline_makes_both_kinds_of_the_same_length(tmp_path):
    pipeline = tiny.video_pipeline(tmp_path)
    shown = long_video.lasting_sprites(1)[0]
    keyframe = scene.render(shown, 1, tiny.SIZE).frames[0]
    kinds = long_video.makers(pipeline, num_segments=3, num_inference_steps=1, guidance_scale=1.0, window_overlap=1)
    videos = {kind: make(shown, keyframe) for kind, make in kinds.items()}
    assert {kind: video.shape for kind, video in videos.items()} == dict.fromkeys(
        ("real", "continuation", "windows"), (10, tiny.SIZE, tiny.SIZE, 3)
    )
    assert np.array_equal(videos["real"][0], keyframe)
    assert not np.array_equal(videos["continuation"], videos["windows"])


def test_from_a_key_frame_in_the_middle_there_is_no_continuation(tmp_path, judge):
    pipeline = tiny.video_pipeline(tmp_path, keyframe_position="center")
    kinds = long_video.makers(pipeline, num_segments=3, num_inference_steps=1, guidance_scale=1.0)
    assert list(kinds) == ["real", "windows"]
    windows = long_video.windows_of(pipeline, 3)
    assert (windows.frames, windows.length, windows.keyframe_index("center")) == (10, 4, 4)
    shown = long_video.lasting_sprites(4)

    def perfect(sprite, keyframe):
        assert np.array_equal(keyframe, real(sprite, 31)[15])
        return real(sprite, 31)

    found = long_video.measure({"perfect": perfect}, shown, judge, SIZE, 15, 8.0)
    assert all(row["object"] == 1 and row["background_psnr"] > 50 for row in found["perfect"])


def test_nothing_to_show_is_refused(judge):
    with pytest.raises(UserError, match="at least one"):
        long_video.measure({}, [], judge, SIZE)
