from functools import partial

import numpy as np
import pytest

from benchmarks import motion_following
from fixtures import tiny
from microcinema.sprites import scene
from microcinema.utils.errors import UserError


def test_scenes_differ_by_their_motion_alone():
    shown = motion_following.scenes(8)
    assert shown == motion_following.scenes(9)[:8]
    for variants in shown:
        assert len({sprite.motion for sprite in variants}) == len(variants) >= len(scene.MOTIONS) - 2
        first = scene.render(variants[0], 1).frames
        for sprite in variants:
            assert np.array_equal(scene.render(sprite, 1).frames, first)
            assert scene.caption(sprite) == scene.caption(variants[0])


def test_real_clips_follow_and_still_ones_only_when_told_to():
    shown = motion_following.scenes(2)
    found = motion_following.measure(motion_following.real, shown, 64, 8.0)
    assert found["motion"]["value"] == 1 and found["speed"]["value"] == 1
    assert found["motion"]["n"] == sum(map(len, shown))

    def frozen(scene, keyframe):
        return np.stack([np.repeat(keyframe[None], 16, axis=0)] * len(scene))

    found = motion_following.measure(frozen, shown, 64, 8.0)
    assert found["motion"]["value"] == pytest.approx(2 / found["motion"]["n"])
    assert found["confusion"]["left"] == {"still": 2} and found["speed"] is None
    with pytest.raises(UserError, match="no key frame"):
        motion_following.measure(frozen, [], 64, 8.0)


def test_real_clips_around_a_key_frame_in_the_middle_show_it_there_and_follow_as_well():
    shown = motion_following.scenes(2)
    for variants in shown:
        keyframe = scene.render(variants[0], 1).frames[0]
        clips = motion_following.real(variants, keyframe, index=8)
        assert np.abs(clips[:, 8].astype(int) - keyframe).max() <= 1
        moving = [sprite.motion != "still" for sprite in variants]
        assert [bool((clip[0] != keyframe).any()) for clip in clips] == moving
    found = motion_following.measure(partial(motion_following.real, index=8), shown, 64, 8.0)
    assert found["motion"]["value"] == 1 and found["speed"]["value"] == 1


@pytest.mark.parametrize("factorized", [False, True])
def test_a_model_is_told_in_its_own_way_and_starts_from_one_noise(tmp_path, factorized):
    pipeline = tiny.video_pipeline(tmp_path, model="factorized_dreamer" if factorized else "plain")
    asked = []
    call = type(pipeline).__call__

    class Spy:
        def __getattr__(self, name):
            return getattr(pipeline, name)

        def __call__(self, *arguments, **settings):
            asked.append(arguments)
            return call(pipeline, *arguments, **settings)

    make = motion_following.pipeline_maker(Spy(), num_inference_steps=1, guidance_scale=1.0)
    variants = motion_following.scenes(1)[0][:2]
    clips = make([variants[0], variants[0]], scene.render(variants[0], 1, tiny.SIZE).frames[0])
    assert clips.shape == (2, 4, tiny.SIZE, tiny.SIZE, 3) and clips.dtype == np.uint8
    assert np.abs(clips[0].astype(int) - clips[1]).max() <= 1
    captions, _, motions = asked[0]
    if factorized:
        assert (captions[0], motions[0]) == (scene.caption(variants[0]), scene.motion_caption(variants[0]))
    else:
        assert (captions[0], motions) == (scene.combined_caption(variants[0]), None)
