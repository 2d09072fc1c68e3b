"""Key frames from real clips; which clips are there is tested with the command."""

import dataclasses

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

from microcinema.config.compose import compose
from microcinema.data.video_writer import write_video
from microcinema.evaluation.real_clips import RealKeyframes
from microcinema.evaluation.videos import Video
from microcinema.pipelines.prompts import PromptItem
from microcinema.utils.errors import UserError


def protocol(**changes):
    whole = compose("evaluate", ["evaluation=ucf101_i2v"]).evaluation.protocol.build()
    return dataclasses.replace(whole, **{"num_frames": 5, "stride": 2, **changes})


def test_the_key_frame_is_the_frame_of_the_clip_at_the_models_place(tmp_path):
    frames = np.stack([np.full((16, 24, 3), 10 * k, np.uint8) for k in range(12)])
    write_video(tmp_path / "b.mp4", frames, 25, lossless=True)
    real = [(0, Video("a", tmp_path / "a.mp4")), (3, Video("b", tmp_path / "b.mp4"))]
    sample = PromptItem("", "00007", source="b")
    for place, model, expected in (("own", 2, 4), ("own", None, 0), ("center", 2, 4), ("first", None, 0), (3, None, 6)):
        keyframes = RealKeyframes.of(protocol(keyframe=place), real, model)
        assert round(keyframes(sample).mean() / 10) == expected, (place, model)
    assert keyframes(sample).shape == (16, 24, 3)  # as large as the video
    (item,) = keyframes.add([sample], tmp_path / "keyframes", PartialState())
    assert item.image == tmp_path / "keyframes" / "00007.png" and np.asarray(Image.open(item.image)).mean() == 60


def test_a_place_that_the_model_does_not_have_is_refused():
    with pytest.raises(UserError, match="keyframe=first is frame 0, and the model's is frame 2; use .*=own"):
        RealKeyframes.of(protocol(keyframe="first"), [], 2)
    assert RealKeyframes.of(protocol(keyframe=None), [], 2) is None
