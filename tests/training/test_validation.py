import math
import types

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixtures import tiny, tiny_training
from fixtures.tiny_training import one_thread  # noqa: F401
from microcinema.data.video_reader import probe, read_clip
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.training.settings import Settings
from microcinema.training.validation import FIGURES, Validation

PROMPTS = ["a red star", "a blue circle"]


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """Two prompts validated at step 7, and again at step 8 with the same model."""
    folder = tmp_path_factory.mktemp("validation")
    accelerator = tiny_training.accelerator(Settings(str(folder), max_train_steps=1))
    accelerator.init_trackers("microcinema")
    keyframe = Image.fromarray(np.full((tiny.SIZE, tiny.SIZE, 3), 90, dtype=np.uint8))
    keyframe.save(folder / "keyframe.png")
    validation = Validation(
        accelerator, KeyframePipeline(folder / "keyframe.png"), PROMPTS, tiny.SIZE, tiny.SIZE, folder, seed=1
    )
    model = tiny_training.pipeline(folder)
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


def test_fidelity_and_motion_are_those_of_the_videos(tmp_path):
    """Two videos of which all is known: one stands still, a grey level off its key frame; the other moves two pixels a frame."""
    keyframe = np.random.default_rng(0).integers(60, 200, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    videos = [np.stack([keyframe + 1] * 4), np.stack([np.roll(keyframe, 2 * f, axis=1) for f in range(4)])]
    Image.fromarray(keyframe).save(tmp_path / "keyframe.png")

    class Known(types.SimpleNamespace):
        def __call__(self, prompt, image, **_):
            frames = videos[PROMPTS.index(prompt)] / 255
            return types.SimpleNamespace(frames=[frames], keyframes=[image])

    accelerator = tiny_training.accelerator(Settings(str(tmp_path), max_train_steps=1))
    accelerator.init_trackers("microcinema")
    validation = Validation(accelerator, KeyframePipeline(tmp_path / "keyframe.png"), PROMPTS, 64, 64, tmp_path)
    model = Known(set_progress_bar_config=lambda **_: None, keyframe_position="first", config={"fps": 8.0})
    validation(accelerator, model, 3)
    accelerator.trackers[0].finish()
    found = {name: tiny_training.logged(tmp_path, f"validation/{name}")[3] for name in FIGURES}
    assert found["keyframe_psnr"] == pytest.approx((20 * math.log10(255) + 60) / 2)
    assert 0.99 < found["keyframe_ssim"] <= 1
    assert 0.7 < found["motion_magnitude"] < 1.1  # at the edge what comes in is from the other side
