"""Ways to 224x224 pixels: each against a definition of its own, and all of them different."""

import itertools

import numpy as np
import pytest
import torch

from microcinema.evaluation.preprocessing import PREPARATIONS, cd_fvd, short_side_crop, squash, tf_squash


def frames(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, height, width), np.uint8))


@pytest.mark.parametrize("size", [(240, 320), (64, 64), (100, 90), (360, 200)])
@pytest.mark.parametrize("name", PREPARATIONS)
def test_every_way_gives_what_i3d_reads(name, size):
    found = PREPARATIONS[name](frames(*size))
    assert found.shape == (2, 3, 224, 224) and found.dtype == torch.float32
    assert -1 <= found.min() < -0.5 and 0.5 < found.max() <= 1 + 1e-6


def test_they_differ():
    video = frames(240, 320)
    for one, two in itertools.combinations(PREPARATIONS.values(), 2):
        assert (one(video) - two(video)).abs().mean() > 0.01


def test_at_224_only_cd_fvd_changes_anything():
    video = frames(224, 224)
    plain = 2 * video.float() / 255 - 1
    for prepare in (tf_squash, squash, short_side_crop):
        torch.testing.assert_close(prepare(video), plain)
    assert (cd_fvd(video) - plain).abs().max() > 0.01


def test_tensorflow_keeps_the_corner_pixel_and_halves_by_dropping():
    video = frames(448, 448)
    torch.testing.assert_close(tf_squash(video), 2 * video[:, :, ::2, ::2].float() / 255 - 1)
    twice = frames(112, 112)
    found = tf_squash(twice)
    torch.testing.assert_close(found[:, :, ::2, ::2], 2 * twice.float() / 255 - 1)
    # Between two pixels lies their mean, and beyond the last one nothing.
    mean = (twice[:, :, :1, :-1].float() + twice[:, :, :1, 1:].float()) / 2
    torch.testing.assert_close(found[:, :, :1, 1:-1:2], 2 * mean / 255 - 1)
    torch.testing.assert_close(found[..., -1], found[..., -2])


def test_the_crop_takes_the_centre():
    wide = torch.zeros(1, 3, 224, 424, dtype=torch.uint8)
    wide[..., 100:324] = 255
    assert (short_side_crop(wide) == 1).all()
    assert (squash(wide) == -1).any()
