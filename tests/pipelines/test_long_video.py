"""Videos longer than a model was trained on: windows over one latent, and clips that continue one another."""

import itertools
import logging

import numpy as np
import pytest
import torch
from einops import repeat

from fixtures import tiny
from fixtures.tiny_sampling import PROMPTS, Oracle, sample
from microcinema.diffusion.rng import generator
from microcinema.diffusion.schedule import make_sampler
from microcinema.pipelines.long_video import Windows
from microcinema.utils.errors import UserError
from microcinema.utils.logging import warn_once

TRAINED = 4  # frames of the tiny models


def latents(pipeline, image, prompt=PROMPTS[0], seeds=(0,), **arguments):
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return sample(pipeline, prompt, image, seeds, **{**settings, **arguments})


# ---------------------------------------------------------------- windows


def test_windows_cover_every_frame_with_the_overlap_that_is_asked_for_and_not_one_too_many():
    for frames, length in itertools.product(range(1, 30), range(1, 9)):
        for overlap in range(length):
            places = Windows(frames, length, overlap).slices
            assert (places[0].start, places[-1].stop) == (0, frames)
            assert {place.stop - place.start for place in places} == {min(length, frames)}
            shared = [a.stop - b.start for a, b in itertools.pairwise(places)]
            assert all(overlap <= count < length for count in shared)
            assert len(places) == 1 or (len(places) - 1) * (length - overlap) + overlap < frames


def test_windows_overlap_by_half_unless_told_otherwise():
    assert Windows(28, 8).slices == Windows(28, 8, 4).slices
    assert Windows(3, 1).slices == [slice(0, 1), slice(1, 2), slice(2, 3)]


@pytest.mark.parametrize(("frames", "overlap"), [(3, 0), (4, 0), (5, 1), (11, 2), (11, 3), (9, 0)])
def test_averaging_is_linear_and_its_weights_sum_to_one_at_every_frame(frames, overlap):
    windows = Windows(frames, TRAINED, overlap)
    z = torch.randn(2, frames, 3, dtype=torch.float64)
    torch.testing.assert_close(windows.average(lambda part: part, z), z)
    assert torch.equal(windows.average(torch.ones_like, z), torch.ones_like(z))
    # Window i predicts i: at each frame that is the mean number of the windows that it lies in.
    number = itertools.count()
    found = windows.average(lambda part: torch.full_like(part, next(number)), z)
    for frame in range(frames):
        inside = [i for i, place in enumerate(windows.slices) if place.start <= frame < place.stop]
        torch.testing.assert_close(found[:, frame], torch.full_like(z[:, frame], np.mean(inside)))


def test_the_key_frame_of_windows_is_the_one_nearest_to_its_place_in_the_whole_video():
    for frames, length, position in itertools.product(range(1, 30), (1, 4, 8), ("first", "center", 0, 1, 3)):
        windows = Windows(frames, length)
        short = min(frames, length)
        index = {"first": 0, "center": short // 2}.get(position, position)
        if index >= short:
            with pytest.raises(UserError, match=f"keyframe_position={position} is not in a clip"):
                windows.keyframe_index(position)
            continue
        places = [window.start + index for window in windows.slices]
        found = windows.keyframe_index(position)
        assert found in places
        if position == "center":
            assert abs(found - frames // 2) == min(abs(place - frames // 2) for place in places)
        else:
            assert found == index  # the first window's
    assert [Windows(frames, 16).keyframe_index("center") for frames in (8, 16, 32, 48)] == [4, 8, 16, 24]
    assert Windows(32, 16, 0).keyframe_index("center") == 8  # no window has it at frame 16


def test_an_oracle_of_each_window_gives_the_whole_video(pipeline, image):
    frames = 11
    z0 = torch.randn(1, frames, tiny.LATENT_CHANNELS, 8, 8, generator=generator(3))
    for name, overlap in [("DDIMScheduler", None), ("DPMSolverMultistepScheduler", 0), ("EulerDiscreteScheduler", 3)]:
        places = itertools.cycle(Windows(frames, TRAINED, overlap).slices)
        known = tiny.video_pipeline(pipeline.config["base"])
        training = known.training_scheduler
        known.register_modules(
            unet=Oracle(known.unet, training, lambda z_t, places=places: z0[:, next(places)]),
            scheduler=make_sampler(training, name, set_alpha_to_one=True),
        )
        z = latents(known, image, num_frames=frames, window_overlap=overlap, num_inference_steps=10)
        assert torch.allclose(z, z0, atol=1e-5)


def test_the_network_never_sees_more_frames_than_it_was_trained_with(base, image):
    pipeline = tiny.video_pipeline(base)
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape[:2])))
    z = latents(pipeline, image, num_frames=11, guidance_scale=2.0)
    assert z.shape[1] == 11
    windows = len(Windows(11, TRAINED).slices)
    assert seen == [(2, TRAINED)] * 2 * windows
    assert latents(pipeline, image, num_frames=23).shape[1] == 23  # far beyond the network's 8 positions


@pytest.mark.parametrize("frames", [1, 3, TRAINED])
def test_up_to_the_trained_length_nothing_changes(pipeline, image, frames, monkeypatch):
    found = latents(pipeline, image, num_frames=frames, window_overlap=1)
    monkeypatch.setattr(Windows, "average", lambda self, predict, z: predict(z))
    assert torch.equal(found, latents(pipeline, image, num_frames=frames))


def test_a_long_video_does_not_depend_on_its_batch(pipeline, image):
    together = latents(pipeline, image, PROMPTS, (0, 1), num_frames=7, num_segments=2)
    alone = latents(pipeline, image, PROMPTS[1], (1,), num_frames=7, num_segments=2)
    assert torch.allclose(together[1:], alone, atol=1e-3)
    assert not torch.allclose(together[:1], alone, atol=1e-1)


# ---------------------------------------------------------------- continuation


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_clips_share_the_frame_between_them(pipeline, image, output_type):
    video = sample(pipeline, PROMPTS[0], image, num_segments=3, output_type=output_type)[0]
    assert len(video) == 3 * (TRAINED - 1) + 1
    first = sample(pipeline, PROMPTS[0], image, output_type=output_type)[0]
    assert np.array_equal(np.stack(video[:TRAINED]), np.stack(first))


def test_continuing_is_animating_the_last_frame_with_the_same_generator(pipeline, image):
    video = sample(pipeline, PROMPTS[0], image, num_segments=3, output_type="pil")[0]
    own, frames, keyframe = [generator(7, 0)], [image], image
    for _ in range(3):
        clip = sample(pipeline, PROMPTS[0], keyframe, generator=own, output_type="pil")[0]
        frames, keyframe = frames[: -1 if len(frames) == 1 else None] + clip[len(frames) > 1 :], clip[-1]
    assert all(np.array_equal(a, b) for a, b in zip(video, frames, strict=True))


def test_each_clip_begins_where_the_one_before_ended_up_to_the_vae(base, image):
    """A denoiser that repeats its key frame: clip k is the key frame after k passes through the VAE, and nothing else."""
    pipeline = tiny.video_pipeline(base, noise_prior="none")
    training, encode, known = pipeline.training_scheduler, pipeline.encode_image, []

    def remember(pixels):
        known.append(encode(pixels))
        return known[-1]

    pipeline.encode_image = remember
    still = Oracle(pipeline.unet, training, lambda z_t: repeat(known[-1], "b c h w -> b f c h w", f=z_t.shape[1]))
    pipeline.register_modules(unet=still, scheduler=make_sampler(training, set_alpha_to_one=True))
    video = sample(pipeline, PROMPTS[0], image, num_segments=3, guidance_scale=1.0, output_type="pt")[0]
    frame = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    for clip in range(3):
        pixels = (frame * 255).round() / 127.5 - 1
        frame = (pipeline.decode_latents(encode(pixels[None])[:, None])[0, 0] / 2 + 0.5).clamp(0, 1)
        start = clip * (TRAINED - 1)
        # The frame in common is the last one of the clip before.
        for found in video[start + bool(clip) : start + TRAINED]:
            assert torch.allclose(found, frame, atol=1e-3)


def test_the_steps_of_every_clip_are_counted_from_zero(pipeline, image):
    steps = []
    latents(pipeline, image, num_segments=2, callback_on_step_end=lambda pipe, step, t, tensors: steps.append(step))
    assert steps == [0, 1, 0, 1]


def test_what_is_done_beyond_the_trained_length_is_said_once(base, image, caplog):
    pipeline = tiny.video_pipeline(base)
    warn_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="microcinema"):
        latents(pipeline, image)
        assert not caplog.records
        for _ in range(2):
            latents(pipeline, image, num_frames=11, window_overlap=1)
        assert [record.getMessage() for record in caplog.records] == [
            "11 frames are more than the 4 that the model was trained with; they are sampled in 4 windows of 4 frames, which overlap "
            "by 1 or more and share the key frame"
        ]
        caplog.clear()
        for _ in range(2):
            latents(pipeline, image, num_segments=2)
        (record,) = caplog.records
        assert record.getMessage().startswith("2 segments of 4 frames are sampled one after another")
        assert "(7 frames in all)" in record.getMessage()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"num_segments": 0}, "num_segments is 0"),
        ({"num_segments": 2, "num_frames": 1}, "num_frames is 1.*at least 2"),
        ({"window_overlap": -1}, "window_overlap is -1"),
        ({"window_overlap": TRAINED}, "window_overlap is 4.*0 to 3"),
    ],
)
def test_bad_lengths_are_named(pipeline, image, bad, words):
    with pytest.raises(UserError, match=words):
        latents(pipeline, image, **bad)


@pytest.mark.parametrize("reference", ["center", 1])
def test_clips_are_continued_only_from_a_first_frame(base, image, reference):
    pipeline = tiny.video_pipeline(base, keyframe_position=reference)
    with pytest.raises(UserError, match=f"keyframe_position={reference}.*num_segments=1"):
        latents(pipeline, image, num_segments=2)
    assert latents(pipeline, image, num_segments=1).shape[1] == TRAINED
    if reference == 1:
        with pytest.raises(UserError, match="keyframe_position=1 is not in a clip of 1 frames"):
            latents(pipeline, image, num_frames=1)
    assert latents(tiny.video_pipeline(base, keyframe_position=0), image, num_segments=2).shape[1] == 2 * TRAINED - 1
