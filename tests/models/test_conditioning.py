import pytest
import torch

from fixtures.tiny_unet import base, encoder_outputs, inputs, network, randomise
from microcinema.models.attention import KeyValue
from microcinema.models.conditioning import drop
from microcinema.utils.errors import UserError


def test_drop_leaves_zeros_of_one_clip_and_the_other_as_it_was():
    value = (torch.full((2, 3), float("nan")), KeyValue(torch.ones(2, 4, 5), torch.ones(2, 4, 5)), None)
    value[0][1] = 1
    tensor, pair, nothing = drop(value, torch.tensor([False, True]))
    assert nothing is None
    for part in (tensor, pair.key, pair.value):
        assert not part[0].any() and part[1].eq(1).all()


@pytest.mark.parametrize("variant", [("microcinema",), ("microcinema_once", "model.keyframe_concat=true")])
@torch.no_grad()
def test_a_dropped_image_leaves_zeros(variant):
    video = network(base(), *variant)
    randomise(video)
    _, _, text, z_ref, fps = inputs(1)
    kept = video.encode(text, z_ref, fps)
    dropped = video.encode(text, z_ref, fps, image_mask=torch.tensor([False, True]))
    pairs = zip((*(kept.reference or ()), kept.keyframe), (*(dropped.reference or ()), dropped.keyframe), strict=True)
    for whole, part in pairs:
        assert whole[0].any() and not part[0].any()
        assert torch.equal(whole[1], part[1])
    assert torch.equal(dropped.text, text) and torch.equal(dropped.fps, fps)


def test_parts_that_the_network_does_not_have_are_none():
    _, _, text, z_ref, fps = inputs(1)
    plain = network(base(), "plain", "model.keyframe_concat=false").encode(text, z_ref, **encoder_outputs())
    assert plain.text is text
    others = (plain.keyframe, plain.reference, plain.fps, plain.image, plain.pixels, plain.motion)
    assert others == (None,) * 6
    assert network(base()).encode(text, z_ref, fps).keyframe is z_ref
    with pytest.raises(UserError, match="same b"):
        network(base()).encode(text, z_ref[:1])
