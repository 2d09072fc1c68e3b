"""What the Fréchet video distance sees of real Moving Sprites clips that are spoiled on purpose, and what gives a still video away."""

import itertools

import cv2
import numpy as np
import pytest

from microcinema.evaluation.detectors import Batch, motion
from microcinema.evaluation.frechet import Moments, frechet_distance
from microcinema.pipelines.sample_folder import to_uint8
from microcinema.pipelines.text_to_video import TextToVideoPipeline
from microcinema.sprites import scene
from microcinema.sprites.judge import SpriteJudge
from microcinema.sprites.protocol import SpritesProtocol

COUNT = 40
MODEL_CLIPS = 12


def render(seed: int, count: int = COUNT, faster: float = 1) -> np.ndarray:
    """uint8 (count, 16, 64, 64, 3); motion is defined in seconds, so that a lower rate moves further a frame."""
    drawn = [scene.sample_attributes(seed, index) for index in range(count)]
    return np.stack([scene.render(sprite, fps=8 / faster).frames for sprite in drawn])


@pytest.fixture(scope="module")
def judge():
    return SpriteJudge.load("sprites-classifier")


@pytest.fixture(scope="module")
def clips():
    return render(2)


@pytest.fixture(scope="module")
def distance(judge, clips):
    """To the clips as they are."""
    real = Moments.of(judge(clips)[1])
    return lambda others: frechet_distance(Moments.of(judge(others)[1]), real)


def blur(clips, sigma):
    return np.stack([[cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip] for clip in clips])


def noise(clips, deviation):
    drawn = np.random.default_rng(0).normal(0, deviation, clips.shape)
    return np.clip(clips + drawn, 0, 255).astype(np.uint8)


def shuffle(clips, count):
    rng = np.random.default_rng(0)
    spoiled = clips.copy()
    for clip in spoiled:
        places = rng.choice(len(clip), count, replace=False)
        clip[places] = clip[rng.permutation(places)]
    return spoiled


def freeze(clips, count):
    spoiled = clips.copy()
    spoiled[:, -count:] = spoiled[:, -count - 1 : -count]
    return spoiled


@pytest.mark.parametrize(
    "spoil, amounts",
    [(blur, (1, 2, 3)), (noise, (16, 32, 64)), (shuffle, (4, 8, 16)), (freeze, (5, 10, 15))],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_distance_rises_with_what_is_spoiled(distance, clips, spoil, amounts):
    values = [distance(clips), *(distance(spoil(clips, amount)) for amount in amounts)]
    assert abs(values[0]) < 1e-6
    assert all(later > 1.3 * before for before, later in itertools.pairwise(values)) and values[-1] > 50, values


def test_distance_rises_with_speed(distance, clips):
    values = [distance(render(2, faster=faster)) for faster in (1, 1.5, 2, 3)]
    assert abs(values[0]) < 1e-6
    assert all(later > 1.3 * before for before, later in itertools.pairwise(values)) and values[-1] > 50, values


@pytest.mark.slow
def test_a_still_video_scores_worse_than_the_model_and_is_exposed_by_its_motion(distance):
    pipeline = TextToVideoPipeline.from_pretrained("sprites-microcinema")
    pipeline.set_progress_bar_config(disable=True)
    prompts = [task.prompt for task in SpritesProtocol(MODEL_CLIPS, 0, 0).tasks()]
    settings = {"num_inference_steps": 8, "guidance_scale": 2.0, "batch_size": 8, "output_type": "np"}
    output = pipeline(prompts, **settings)
    model = to_uint8(output.frames)
    keyframes = np.stack([np.asarray(keyframe.image) for keyframe in output.keyframes])
    still = np.repeat(keyframes[:, None], 16, axis=1)
    assert distance(still) > 1.1 * distance(model)
    moved = motion(Batch(model))["motion_magnitude"].mean()
    assert motion(Batch(still))["motion_magnitude"].max() < 0.02 < 0.1 < moved
