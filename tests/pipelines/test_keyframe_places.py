"""Sampling with key frames at chosen places: what the network gets, interpolation, continuation, and what is refused."""

import numpy as np
import pytest
import torch

from fixtures import tiny
from fixtures.tiny_sampling import PROMPTS, image, sample
from microcinema.diffusion.rng import generator
from microcinema.pipelines.keyframe import as_tensor
from microcinema.pipelines.keyframe_places import (
    TrainedPlaces,
    check_interpolation,
    interpolation_windows,
    read_keyframes,
    split_keyframes,
)
from microcinema.pipelines.saving import load_keyframe_pipeline, load_pipeline, save_pipeline
from microcinema.pipelines.text_to_video import TextToVideoPipeline
from microcinema.utils.errors import UserError

PLACES = ("model.keyframe_places=true", "keyframe_places=0.5")
PIXELS = "model.pixels={block: attention, scales: null}"


@pytest.fixture(scope="module")
def model(base):
    """Trained for any place, with the second of four frames as its own."""
    return tiny.video_pipeline(base, changes=PLACES, keyframe_position=1)


@pytest.fixture
def encoded(model, monkeypatch):
    """What `VideoUNet.encode` was called with, clip by clip."""
    calls, encode = [], model.unet.encode
    monkeypatch.setattr(model.unet, "encode", lambda **inputs: calls.append(inputs) or encode(**inputs))
    return calls


def latents(pipeline, prompt=PROMPTS[0], image=None, **arguments):
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    return sample(pipeline, prompt, image, **{**settings, **arguments})


def z_of(pipeline, *images):
    return pipeline.encode_image(as_tensor(images))


def test_the_network_gets_each_key_frame_at_its_place_and_the_nearest_to_its_own_as_the_main_one(model, encoded):
    first, last = image(1), image(2)
    latents(model, image=first)
    latents(model, keyframes={0: first, 3: last})
    latents(model, image=last, keyframes={2: None, 3: first})
    z_first, z_last = z_of(model, first), z_of(model, last)
    expected = [({1: z_first}, z_first), ({0: z_first, 3: z_last}, z_first), ({2: z_last, 3: z_first}, z_last)]
    for inputs, (places, main) in zip(encoded, expected, strict=True):
        torch.testing.assert_close(inputs["z_ref"], main)
        for place in range(4):
            placed = inputs["placed"][:, place]
            if place in places:
                torch.testing.assert_close(placed[:, :4], places[place])
            assert placed[:, 4].eq(place in places).all()


def test_each_of_a_batch_has_its_own_images_and_is_what_it_is_alone(model):
    both = {0: [image(1), image(2)], 3: image(3)}
    together = latents(model, PROMPTS, keyframes=both, seeds=(0, 1))
    alone = latents(model, PROMPTS[1], keyframes={0: image(2), 3: image(3)}, seeds=(1,))
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)
    other = latents(model, PROMPTS[1], keyframes={0: image(2), 3: image(4)}, seeds=(1,))
    assert (other - alone).abs().max() > 1e-3


def test_a_model_saved_and_opened_knows_its_places(model, tmp_path):
    save_pipeline(model, tmp_path / "saved", with_base=False)
    again = load_pipeline(tmp_path / "saved")
    assert again.trained_places == TrainedPlaces(1, others=True, needs_own=False)
    places = {0: image(1), 3: image(2)}
    torch.testing.assert_close(latents(again, keyframes=places), latents(model, keyframes=places), atol=1e-3, rtol=1e-3)


def test_clips_are_continued_from_a_key_frame_at_their_first_place(model, encoded):
    video = latents(model, image=image(1), num_segments=2)
    assert video.shape[1] == 7
    masks = [inputs["placed"][0, :, 4, 0, 0].tolist() for inputs in encoded]
    assert masks == [[0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("factor", [2, 4])
def test_interpolation_keeps_the_frames_and_makes_others_from_their_neighbors(base, factor):
    model = tiny.video_pipeline(base, changes=PLACES, keyframe_position=1, num_frames=5)
    calls, encode = [], model.unet.encode
    model.unet.encode = lambda **inputs: calls.append(inputs) or encode(**inputs)
    # Six frames, so that the last window of two gaps begins where the one before has a gap left.
    settings = {"image": image(1), "num_frames": 3, "fps": 6.0, "num_segments": 2}
    coarse = latents(model, **settings)
    del calls[:]
    fine = latents(model, **settings, interpolate=factor)
    assert fine.shape[1] == factor * 4 + 1 and torch.equal(fine[:, ::factor], coarse)
    windows = interpolation_windows(5, factor, 5)
    assert len(calls) == 2 + len(windows)
    for inputs, window in zip(calls[2:], windows, strict=True):
        assert inputs["fps"].tolist() == [6.0 * factor]
        torch.testing.assert_close(inputs["placed"][:, ::factor, :4], coarse[:, window])
        assert inputs["placed"][0, :, 4, 0, 0].sum() == window.stop - window.start
    frames = sample(model, PROMPTS[0], num_inference_steps=1, guidance_scale=1.0, **settings, interpolate=factor)
    decoded = model.decode_latents(fine)[0].permute(0, 2, 3, 1) / 2 + 0.5
    np.testing.assert_allclose(frames[0], decoded.clamp(0, 1).numpy(), atol=1e-4)


def test_windows_of_interpolation_have_all_gaps_and_as_many_key_frames_each():
    for frames in range(2, 12):
        for factor in (2, 4):
            for length in range(factor + 1, 18):
                windows = interpolation_windows(frames, factor, length)
                assert {i for w in windows for i in range(w.start, w.stop - 1)} == set(range(frames - 1))
                (count,) = {w.stop - w.start for w in windows}
                assert factor * (count - 1) + 1 <= length and windows[-1].stop == frames
                assert len(windows) == -(-(frames - 1) // (count - 1))


def test_a_model_of_pixels_keeps_a_key_frame_at_its_own_place(base):
    model = tiny.video_pipeline(base, model="plain", changes=(*PLACES, PIXELS))
    seen, encode = [], model.encode_pixels
    model.encode_pixels = lambda pixels: seen.append(pixels) or encode(pixels)
    latents(model, keyframes={3: image(2), 0: image(1)}, interpolate=2)
    assert torch.equal(seen[0], as_tensor([image(1)]))  # and then of decoded frames
    assert len(seen) == 4
    with pytest.raises(
        UserError, match="key frames are at 3, but this model reads the pixels of the key frame at frame 0"
    ):
        latents(model, keyframes={3: image(2)})
    center = tiny.video_pipeline(base, model="plain", changes=(*PLACES, PIXELS), keyframe_position="center")
    with pytest.raises(UserError, match="interpolate=2 places key frames at every 2 frames, but .* at frame 1"):
        latents(center, image=image(1), interpolate=2)
    with pytest.raises(UserError, match="so that no segment can continue another"):
        latents(center, image=image(1), num_segments=2)


def test_key_frames_of_stage_1_and_given_ones(base, model):
    both = TextToVideoPipeline(load_keyframe_pipeline(model), model)
    both.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "seed": 3}
    loop = both(PROMPTS[0], keyframes={0: None, 3: None}, **settings)
    drawn = loop.keyframes[0].image
    rng = [generator(3, 0, 0)]
    expected = latents(model, image=drawn, keyframes={0: None, 3: None}, generator=rng)
    torch.testing.assert_close(loop.frames, expected)
    given = both(PROMPTS[0], keyframes={0: image(1), 3: image(2)}, **settings)
    assert np.array_equal(given.keyframes[0].image, image(1)) and given.keyframes[0].provenance["source"] == "array"
    expected = latents(model, keyframes={0: image(1), 3: image(2)}, generator=[generator(3, 0, 0)])
    torch.testing.assert_close(given.frames, expected)


def test_a_model_without_places_has_its_own_alone(pipeline):
    assert torch.equal(latents(pipeline, keyframes={0: image(1)}), latents(pipeline, image=image(1)))
    for bad, words in (
        ({"keyframes": {3: image(1)}}, "at 3, but this model was trained for frame 0 alone; use that, or a model with"),
        ({"keyframes": {0: image(1), 3: image(1)}}, "at 0, 3, but this model was trained for frame 0 alone"),
        ({"image": image(1), "interpolate": 2}, "interpolate=2 places key frames .* trained for frame 0 alone"),
    ):
        with pytest.raises(UserError, match=words):
            latents(pipeline, **bad)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({}, "no image for the key frame"),
        ({"image": image(1), "keyframes": {0: image(2)}}, "an image for no key frame"),
        ({"keyframes": {0: None}}, "no image for the key frame"),
        ({"keyframes": {}, "image": image(1)}, "an image for no key frame"),
        ({"keyframes": {}}, "there is no key frame, in a clip of 4 frames; use 0 to 3"),
        ({"keyframes": {4: image(1)}}, "a key frame is at 4, in a clip of 4 frames; use 0 to 3"),
        ({"keyframes": {-1: image(1)}}, "a key frame is at -1"),
        ({"keyframes": {"0": image(1)}}, "a key frame is at '0'"),
        ({"keyframes": {0: image(1)}, "num_frames": 6}, "num_frames=6 is more than the 4 of one; use num_segments"),
        ({"keyframes": {0: [image(1), image(2)]}}, "2 images for 1 prompts"),
        ({"image": image(1), "interpolate": 3}, "interpolate is 3"),
        (
            {"image": image(1), "interpolate": 4},
            "interpolate=4 needs 2 frames and a model of 5 or more; .* the model 4",
        ),
    ],
)
def test_bad_key_frames_are_named(model, bad, words):
    with pytest.raises(UserError, match=words):
        latents(model, **bad)


def test_one_frame_has_no_neighbors():
    with pytest.raises(UserError, match="interpolate=2 needs 2 frames .* this video has 1, and the model 4"):
        check_interpolation(2, 1, 4, TrainedPlaces(0, others=True, needs_own=False))


def test_entries_of_the_command_line():
    found = read_keyframes(["0:a b.png", 7, "15:c:/d.png"])
    assert {place: file and str(file) for place, file in found.items()} == {0: "a b.png", 7: None, 15: "c:/d.png"}
    assert read_keyframes(None) is None
    for entries, words in (
        (["a.png"], "entry 'a.png'"),
        (["3:"], "entry '3:'"),
        ([1, "1:a.png"], "two images at frame 1"),
    ):
        with pytest.raises(UserError, match=words):
            read_keyframes(entries)
    assert split_keyframes({0: "a", 5: "b"}, 5) == ("b", {0: "a", 5: None})
    assert split_keyframes({0: "a", 5: None}, 0) == (None, {0: "a", 5: None})
