import math
import types

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixtures import tiny, tiny_training
from microcinema.config.sampling import SamplingSettings
from microcinema.data.video_reader import probe, read_clip
from microcinema.data.video_writer import _MARK
from microcinema.diffusion.guidance import Guidance
from microcinema.pipelines import image_to_video
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.training.build import build_keyframes
from microcinema.training.validation import FIGURES, Validation

PROMPTS = ["a red star", "a blue circle"]


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """Two prompts validated at step 7, and again at step 8 with the same model."""
    folder = tmp_path_factory.mktemp("validation")
    accelerator = tiny_training.accelerator(tiny_training.make_config(folder, max_train_steps=1))
    accelerator.init_trackers("microcinema")
    keyframe = Image.fromarray(np.full((tiny.SIZE, tiny.SIZE, 3), 90, dtype=np.uint8))
    keyframe.save(folder / "keyframe.png")
    model = tiny_training.pipeline(folder)
    validation = Validation(accelerator, model, KeyframePipeline(folder / "keyframe.png"), PROMPTS, folder, seed=1)
    for step in (7, 8):
        validation(accelerator, model, step)
    accelerator.trackers[0].finish()
    return folder


def test_videos_are_written_for_every_prompt(validated):
    for i in range(len(PROMPTS)):
        info = probe(validated / f"validation/step-7/{i}.mp4")
        assert (info.num_frames, info.fps, info.width, info.height) == (tiny_training.FRAMES, 8.0, tiny.SIZE, tiny.SIZE)
    with Image.open(validated / "validation/step-7/contact_sheet.png") as sheet:
        assert sheet.width >= tiny_training.FRAMES * tiny.SIZE


def test_only_the_model_differs_between_steps(validated):
    one, other = (read_clip(validated / f"validation/step-{step}/0.mp4", tiny_training.FRAMES) for step in (7, 8))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, read_clip(validated / "validation/step-7/1.mp4", tiny_training.FRAMES))


def test_videos_and_fidelity_go_to_the_tracker(validated):
    events = EventAccumulator(str(validated / "logs/microcinema"))
    events.Reload()
    assert events.Tags()["images"] == ["validation/0", "validation/1"]
    assert [event.step for event in events.Images("validation/1")] == [7, 8]
    assert events.Images("validation/1")[0].encoded_image_string == (validated / "validation/step-7/1.gif").read_bytes()


@pytest.mark.parametrize(("position", "index"), [("first", 0), ("center", 2), (3, 3)])
def test_fidelity_and_motion_are_those_of_the_videos(tmp_path, position, index):
    """Two videos of which all is known: one stands still, a grey level off its key frame; the other moves two pixels a frame."""
    keyframe = np.random.default_rng(0).integers(60, 200, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    videos = [np.stack([keyframe + 1] * 4), np.stack([np.roll(keyframe, 2 * (f - index), axis=1) for f in range(4)])]
    Image.fromarray(keyframe).save(tmp_path / "keyframe.png")

    class Known(types.SimpleNamespace):
        def __call__(self, prompt, image, motion_prompt, **_):
            frames = videos[PROMPTS.index(prompt[0])] / 255
            return types.SimpleNamespace(frames=[frames], keyframes=image)

    accelerator = tiny_training.accelerator(tiny_training.make_config(tmp_path, max_train_steps=1))
    accelerator.init_trackers("microcinema")
    model = Known(
        set_progress_bar_config=lambda **_: None,
        keyframe_position=position,
        config={"fps": 8.0, "keyframe_num_inference_steps": None, "keyframe_guidance_scale": None},
        resolve=lambda _: SamplingSettings(64, 64, num_inference_steps=1, guidance_scale=1.0),
    )
    validation = Validation(accelerator, model, KeyframePipeline(tmp_path / "keyframe.png"), PROMPTS, tmp_path)
    validation(accelerator, model, 3)
    accelerator.trackers[0].finish()
    found = {name: tiny_training.logged(tmp_path, f"validation/{name}")[3] for name in FIGURES}
    assert found["keyframe_psnr"] == pytest.approx((20 * math.log10(255) + 60) / 2)
    assert 0.99 < found["keyframe_ssim"] <= 1
    assert 0.7 < found["motion_magnitude"] < 1.1  # at the edge what comes in is from the other side
    sheet = np.array(Image.open(tmp_path / "validation/step-3/contact_sheet.png"))
    left = 8 + index * (64 + 4)
    marked = np.flatnonzero((sheet == _MARK).all(axis=2).sum(axis=0) == len(PROMPTS) * (64 + 6))
    assert marked.tolist() == [left - 3, left - 2, left + 64 + 1, left + 64 + 2]


def test_both_stages_use_the_model_s_own_defaults(tmp_path, monkeypatch):
    """Those of a model that was saved with unusual ones; the key frames' guidance is its own, their steps are the video's."""
    accelerator = tiny_training.accelerator(tiny_training.make_config(tmp_path, max_train_steps=1))
    accelerator.init_trackers("microcinema")
    base = load_base(tiny.base_folder(tmp_path / "base"))
    model = tiny_training.pipeline(
        tmp_path, num_inference_steps=3, guidance_scale=2.5, image_guidance_scale=1.5, keyframe_guidance_scale=4.5
    )
    calls, guidances, draw, make = [], [], KeyframePipeline.__call__, image_to_video.make_guidance
    monkeypatch.setattr(KeyframePipeline, "__call__", lambda *a, **k: calls.append(k) or draw(*a, **k))
    monkeypatch.setattr(image_to_video, "make_guidance", lambda own: guidances.append(make(own)) or make(own))
    validation = Validation(accelerator, model, build_keyframes(base), PROMPTS[:1], tmp_path)
    validation(accelerator, model, 1)
    accelerator.trackers[0].finish()
    drawn = {key: value for key, value in calls[0].items() if value is not None}
    assert drawn == {"num_inference_steps": 3, "guidance_scale": 4.5, "batch_size": 1}
    assert guidances == [Guidance(2.5, 1.5)]
    assert model.num_timesteps == 3
