import cv2
import numpy as np
import pytest

from microcinema.evaluation import video_metrics
from microcinema.sprites import scene
from microcinema.utils.errors import UserError


def clips(count: int = 24) -> list[tuple[scene.Sprite, scene.Rendered]]:
    return [(s, scene.render(s)) for s in (scene.sample_attributes(5, i) for i in range(count))]


def test_psnr_closed_form_and_identity():
    image = np.full((32, 32, 3), 100, np.uint8)
    psnr, _ = video_metrics.image_fidelity(image + np.uint8(5), image)
    assert psnr == pytest.approx(20 * np.log10(255 / 5))
    textured = clips(1)[0][1].frames[0]
    assert video_metrics.image_fidelity(textured, textured) == (60.0, pytest.approx(1.0))
    psnr, ssim = video_metrics.image_fidelity(cv2.GaussianBlur(textured, (0, 0), 2), textured)
    assert psnr < 40 and ssim < 0.95
    with pytest.raises(UserError, match="32"):
        video_metrics.image_fidelity(image, textured)


@pytest.mark.parametrize("channel", ["brightness", "saturation"])
def test_flow_of_a_shifted_picture(channel):
    picture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8), (0, 0), 3)
    picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX)
    shifted = np.roll(picture, (2, -1), axis=(0, 1))  # everything moves 1 to the left and 2 down
    flow = video_metrics.optical_flow(picture, shifted, channel)[16:-16, 16:-16]
    np.testing.assert_allclose(flow.mean(axis=(0, 1)), [-1, 2], atol=0.1)
    assert video_metrics.motion_magnitude(flow[None]) == pytest.approx(5**0.5, abs=0.1)


def test_endpoint_error_is_the_mean_distance_inside_the_mask():
    truth, masks = np.zeros((1, 4, 4, 2)), np.zeros((2, 4, 4))
    masks[0, 0, :2] = 1
    flow = np.full((1, 4, 4, 2), 100.0)
    flow[0, 0, 0], flow[0, 0, 1] = (3, 4), (0, 1)
    assert video_metrics.endpoint_error(flow, truth, masks) == 3
    assert np.isnan(video_metrics.endpoint_error(flow, truth, np.zeros((2, 4, 4))))


def test_flow_of_real_clips_is_near_the_truth():
    moving = [clip for sprite, clip in clips() if sprite.motion != "still"]
    errors = [
        video_metrics.endpoint_error(video_metrics.clip_flow(c.frames, "saturation"), c.flow, c.masks) for c in moving
    ]
    nothing = [video_metrics.endpoint_error(np.zeros_like(c.flow), c.flow, c.masks) for c in moving]
    assert np.median(errors) < 0.1
    assert np.mean(errors) < 0.3 * np.mean(nothing)


def test_static_means_that_nothing_leaves_its_place():
    for sprite, clip in clips():
        assert video_metrics.is_static(clip.frames) == (sprite.motion == "still"), scene.combined_caption(sprite)
    noisy = clip.frames[:1].repeat(16, axis=0) + np.random.default_rng(0).integers(0, 4, (16, 64, 64, 3), np.uint8)
    assert video_metrics.is_static(noisy)


def test_consistency_falls_with_flicker():
    _, clip = clips(1)[0]
    frozen = clip.frames[:1].repeat(16, axis=0)
    assert video_metrics.frame_consistency(frozen, video_metrics.clip_flow(frozen)) == 60
    steady = video_metrics.frame_consistency(clip.frames, video_metrics.clip_flow(clip.frames))
    noise = np.random.default_rng(0).normal(0, 12, clip.frames.shape)
    flicker = np.clip(clip.frames + noise, 0, 255).astype(np.uint8)
    assert video_metrics.frame_consistency(flicker, video_metrics.clip_flow(flicker)) < steady - 5
