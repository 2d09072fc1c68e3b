"""Places of key frames: the draws of training, the main one, and what the network sees."""

from collections.abc import Sequence
from typing import get_args

import pytest
import torch

from microcinema.config.types import PlaceSet
from microcinema.data.keyframe_places import draw_places, main_keyframe, place_keyframes
from microcinema.diffusion.rng import generator

ALL = get_args(PlaceSet)


def test_places_are_the_models_own_or_one_of_seven_sets():
    def drawn(probability: float, frames: int = 8, sets: Sequence[str] = ALL) -> list[tuple[int, ...]]:
        rows = (draw_places(frames, 5, probability, sets, generator(0, i)) for i in range(700))
        return [tuple(row.nonzero()[:, 0].tolist()) for row in rows]

    assert set(drawn(0.0)) == {(5,)}
    sets = drawn(1.0)
    for expected in ((0, 7), (0, 2, 4, 6), (0, 4)):
        assert sets.count(expected) == pytest.approx(100, abs=35)
    assert all(1 <= len(places) <= 4 for places in sets)
    assert len(set(sets)) > 40  # the random ones
    assert drawn(0.4).count((5,)) == pytest.approx(420, abs=45)
    assert set(drawn(1.0, sets=["ends", "every_fourth"])) == {(0, 7), (0, 4)}
    assert set(drawn(1.0, frames=1)) == {(0,)}  # of a picture


def test_the_main_key_frame_is_the_nearest_to_the_models_own_place():
    def main(*places: int, own: int = 4) -> int:
        return int(main_keyframe(torch.isin(torch.arange(9), torch.tensor(places)), own))

    assert (main(4), main(0, 8), main(0, 3, 5), main(1, 8), main(8), main(0, 8, own=8)) == (4, 0, 3, 1, 8, 8)


def test_between_placed_key_frames_is_their_blend_and_beyond_them_the_nearest():
    latents = torch.full((2, 6, 4, 2, 2), torch.nan)
    places = torch.tensor([[False, True, False, False, False, True], [False, False, True, False, False, False]])
    latents[places] = torch.randn(3, 4, 2, 2)
    placed = place_keyframes(latents, places)  # not even a NaN of the other frames is in it
    assert placed.shape == (2, 6, 5, 2, 2)
    assert torch.equal(placed[:, :, 4].eq(1).all((2, 3)), places) and placed[:, :, 4].sum() == 4 * places.sum()
    first, last, only = latents[places]
    wanted = [first, first, 0.75 * first + 0.25 * last, (first + last) / 2, 0.25 * first + 0.75 * last, last]
    torch.testing.assert_close(placed[0, :, :4], torch.stack(wanted))
    assert torch.equal(placed[1, :, :4], only.expand(6, -1, -1, -1))
