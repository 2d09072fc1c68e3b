import pytest

from microcinema.sprites import scene
from microcinema.sprites.protocol import SpritesProtocol
from microcinema.utils.errors import UserError


def test_parts_hold_what_they_say():
    tasks = SpritesProtocol(30, 20, 10).tasks()
    assert [task.part for task in tasks] == ["seen"] * 30 + ["heldout"] * 20 + ["image"] * 10
    for task in tasks:
        held_out = (task.sprite.shape, task.sprite.colour) in scene.HELD_OUT
        assert held_out == (task.part == "heldout")
        assert task.prompt == scene.combined_caption(task.sprite)
    assert len({task.name for task in tasks}) == len({task.numbers for task in tasks}) == 60


def test_a_short_run_is_the_beginning_of_a_long_one():
    short, long = SpritesProtocol(3, 2, 1).tasks(), SpritesProtocol(9, 9, 9).tasks()
    assert set(short) <= set(long)


def test_identifier_tells_measurements_apart():
    assert SpritesProtocol(3, 2, 1).identifier == SpritesProtocol(3, 2, 1).identifier
    others = [SpritesProtocol(4, 2, 1), SpritesProtocol(3, 2, 1, num_frames=8), SpritesProtocol(3, 2, 1, fps=4)]
    assert len({protocol.identifier for protocol in [SpritesProtocol(3, 2, 1), *others]}) == 4
    # Whoever changes what is asked for has to raise the version: numbers of other prompts are not comparable.
    assert SpritesProtocol().identifier == "sprites-3-c752a361ae00"


def test_bad_counts_are_named():
    with pytest.raises(UserError, match="all numbers of prompts are 0"):
        SpritesProtocol(0, 0, 0)
    with pytest.raises(UserError, match="-1"):
        SpritesProtocol(5, -1, 0)
    with pytest.raises(UserError, match="num_frames=1"):
        SpritesProtocol(num_frames=1)
