"""Both stages together, on tiny random models."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fixtures import tiny
from microcinema.config.sampling import PRESETS, KeyframeSettings, SamplingSettings
from microcinema.diffusion.rng import generator
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.saving import load_keyframe_pipeline
from microcinema.pipelines.text_to_video import TextToVideoPipeline, keyframe_arguments
from microcinema.utils.errors import UserError

PROMPTS = ["a red star moving to the left on sand", "a large blue moon"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    video = tiny.video_pipeline(tmp_path_factory.mktemp("base"))
    pipeline = TextToVideoPipeline(load_keyframe_pipeline(video), video)
    pipeline.keyframe.set_progress_bar_config(disable=True)
    return pipeline


def sample(both, prompt, **arguments):
    return both(prompt, **{"output_type": "np", "num_inference_steps": 2, **arguments})


def test_text_to_video_draws_from_the_base_and_keeps_the_key_frames(both):
    output = sample(both, PROMPTS, num_videos_per_prompt=2, batch_size=4)
    assert output.frames.shape == (4, 4, tiny.SIZE, tiny.SIZE, 3)
    assert [keyframe.provenance["prompt"] for keyframe in output.keyframes] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert len({keyframe.provenance["sha256_of_pixels"] for keyframe in output.keyframes}) == 4
    alone = sample(both, PROMPTS[1], num_videos_per_prompt=2, sample_index=1)
    assert np.array_equal(alone.keyframes[1].image, output.keyframes[3].image)
    assert np.abs(alone.frames[1] - output.frames[3]).max() < 1e-3


def test_texts_of_a_prompt_are_those_of_all_its_videos(both):
    negatives = ["grass", "wood"]
    together = sample(both, PROMPTS, num_videos_per_prompt=2, negative_prompt=negatives, batch_size=4).frames
    for index, (prompt, negative) in enumerate(zip(PROMPTS, negatives, strict=True)):
        alone = sample(both, prompt, num_videos_per_prompt=2, negative_prompt=negative, sample_index=index).frames
        assert np.abs(alone - together[2 * index : 2 * index + 2]).max() < 1e-3
    assert np.abs(sample(both, PROMPTS[0]).frames[0] - together[0]).max() > 1e-3


def test_generators_draw_key_frames_and_videos(both):
    """One each makes a video independent of the others; one for all draws the key frames first."""

    def draw(prompt, generator, **arguments):
        return sample(both, prompt, generator=generator, output_type="latent", return_dict=False, **arguments)

    frames, keyframes = draw(PROMPTS, [generator(1), generator(2)], batch_size=2)
    alone, keyframe = draw(PROMPTS[1], generator(2))
    assert np.array_equal(keyframe[0].image, keyframes[1].image) and torch.allclose(alone[0], frames[1], atol=1e-3)
    again, _ = draw(PROMPTS[1], [generator(2)])
    assert torch.equal(again, alone)
    frames, keyframes = draw(PROMPTS[0], generator(1), num_videos_per_prompt=2)
    _, first = draw(PROMPTS[0], generator(1))
    assert np.array_equal(first[0].image, keyframes[0].image)
    assert not np.array_equal(keyframes[0].image, keyframes[1].image) and not torch.allclose(frames[0], frames[1])


def test_clips_go_on_from_the_key_frame(both):
    output = sample(both, PROMPTS[0], num_segments=2, num_frames=6, window_overlap=1)
    assert output.frames.shape[1] == 11
    one = sample(both, PROMPTS[0], num_frames=6, window_overlap=1)
    assert np.abs(output.frames[0, :6] - one.frames[0]).max() < 1e-3


def test_flagged_key_frames_are_an_error_or_left_out_or_kept(tmp_path):
    video = tiny.video_pipeline(tiny.flagging(tmp_path))
    pipeline = TextToVideoPipeline(load_keyframe_pipeline(video), video)
    pipeline.keyframe.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match="flagged"):
        sample(pipeline, PROMPTS)
    for output_type in ("np", "pil"):
        output = sample(pipeline, PROMPTS, output_type=output_type, keyframe=KeyframeSettings(on_flagged="skip"))
        assert len(output.frames) == len(output.keyframes) == 0
    kept = sample(pipeline, PROMPTS, num_inference_steps=1, keyframe=KeyframeSettings(on_flagged="keep"))
    assert len(kept.frames) == len(kept.keyframes) == 2 and "flagged" in kept.keyframes[1].provenance


@pytest.mark.parametrize("bad", [{"guidance_scale": float("nan")}, {"num_inference_steps": 0}, {"on_flagged": "hide"}])
def test_settings_of_stage_1_are_checked_where_they_are_made(bad):
    with pytest.raises(UserError, match=f"keyframe.{next(iter(bad))} is "):
        KeyframeSettings(**bad)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"num_segments": 0}, "num_segments"),
        ({"window_overlap": 4}, "window_overlap"),
        ({"width": 30}, "width 30"),
        ({"fps": 0}, "fps"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"steps": 3}, "argument 'steps' is unknown"),
        ({"motion_prompt": "up"}, "no motion encoder"),
        ({"generator": [generator(1)]}, "1 generators for 2 videos"),
        ({"generator": np.random.default_rng(0)}, "give a torch.Generator"),
        ({"generator": generator(1), "seed": 1}, "seed=1, sample_index=0 and a generator"),
    ],
)
def test_bad_calls_are_found_before_anything_is_drawn(both, monkeypatch, bad, words):
    monkeypatch.setattr(KeyframePipeline, "__call__", lambda *_, **__: pytest.fail("it was drawn"))
    with pytest.raises(UserError, match=words):
        both(PROMPTS, **bad)


@pytest.mark.parametrize("preset", PRESETS)
def test_explicit_settings_come_before_those_of_a_preset_and_the_model_s_own_last(preset):
    own = dict.fromkeys(("height", "width", "num_frames", "fps", "guidance_scale", "image_guidance_scale"), 8)
    own |= {"num_inference_steps": 40, "keyframe_num_inference_steps": 30, "keyframe_guidance_scale": 3.0}
    own |= {"noise_prior_gamma": 0.02}
    source = SimpleNamespace(takes=lambda name: name != "negative_prompt")

    def steps(keyframe=None, **settings):
        video, stage1 = (
            SamplingSettings(preset=preset, **settings).resolve(own, 8),
            KeyframeSettings(**(keyframe or {})),
        )
        arguments = keyframe_arguments(source, PromptItem("a star"), own, video, stage1)
        assert arguments["guidance_scale"] == 3.0 and video.cache_interval == settings.get("cache_interval", 1)
        return video.num_inference_steps, arguments["num_inference_steps"]

    assert steps() == {"quality": (40, 30), "balanced": (15, 25), "fast": (10, 25)}[preset]
    assert steps({"num_inference_steps": 7}, num_inference_steps=9, cache_interval=2) == (9, 7)
    own["num_inference_steps"] = 4  # a model of few steps
    assert steps()[0] == 4 and steps(num_inference_steps=9)[0] == 9
