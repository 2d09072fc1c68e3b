"""Key frames at their places in the network: zero at the start, one convolution of each branch, one share, nothing for others."""

import pytest
import torch

from fixtures.tiny_unet import EVERYTHING, base, encoder_outputs, inputs, network, per_frame, randomise
from microcinema.data.keyframe_places import place_keyframes
from microcinema.utils.errors import UserError

PLACES = ("model.keyframe_places=true", "keyframe_places=0.5")


def placed(*places, frames=4):
    latents = torch.randn(2, frames, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(2, frames, dtype=torch.bool)
    mask[:, list(places)] = True
    return place_keyframes(latents, mask)


@pytest.mark.parametrize("variant", [("plain",), EVERYTHING], ids=lambda v: v[0])
@torch.no_grad()
def test_it_starts_as_the_2d_unet_and_each_place_reaches_its_own_frame_by_the_new_convolution(variant):
    unet = base()
    video = network(unet, *variant, *PLACES)
    z_t, t, text, z_ref, fps = inputs(4)

    def predict(*places):
        conditions = video.encode(text, z_ref, fps, **encoder_outputs(), placed=placed(*places))
        return video(z_t, t, conditions)

    torch.testing.assert_close(predict(0, 3), per_frame(unet, z_t, t, text), atol=1e-5, rtol=1e-5)
    convolutions = [part.placed_conv_in for part in (video, getattr(video, "appear_net", None)) if part is not None]
    assert len(convolutions) == sum("placed_conv_in" in name for name in video.state_dict())
    # By these weights alone does a place change anything, and while temporal layers are zero only frames of which it is a neighbor.
    randomise(*convolutions)
    changed = (predict(0, 1, 3) - predict(0, 1)).abs().amax(dim=(0, 2, 3, 4))
    assert changed[2:].min() > 1e-4 and changed[:2].max() == 0


@torch.no_grad()
def test_what_is_placed_is_added_with_a_gate_that_depends_on_time_and_on_whether_a_key_frame_is_there():
    video = network(base(), "plain", *PLACES)
    z_t, t, text, z_ref, fps = inputs(4)
    given = placed(0, 2)
    conditions = video.encode(text, z_ref, fps, **encoder_outputs(), placed=given)
    without = video(z_t, t, conditions)
    randomise(video.placed_gates)
    share = (video(z_t, t, conditions) - without) / given[:, :, :4]
    torch.testing.assert_close(share, share[:, :, :, :1, :1].expand_as(share), rtol=1e-2, atol=1e-4)
    share = share.mean((3, 4))
    # Frame 1 lies between, frame 3 beyond; frames have their own embedding, which is zero here.
    torch.testing.assert_close(share[:, [0, 1]], share[:, [2, 3]], rtol=1e-2, atol=1e-4)
    assert (share[:, 0] - share[:, 1]).abs().min() > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert video(z_t, t, conditions).isfinite().all()
    other = (video(z_t, t / 2, conditions) - network(base(), "plain", *PLACES)(z_t, t / 2, conditions)) / given[
        :, :, :4
    ]
    assert (other.mean((3, 4)) - share).abs().max() > 1e-3


@torch.no_grad()
def test_other_networks_have_neither_the_weights_nor_the_condition():
    video, with_places = network(base(), "microcinema"), network(base(), "microcinema", *PLACES)
    assert with_places.state_dict().keys() - video.state_dict().keys() == {
        "placed_conv_in.weight",
        "placed_gates.weight",
        "placed_gates.bias",
        "appear_net.placed_conv_in.weight",
    }
    _, _, text, z_ref, fps = inputs(4)
    assert video.encode(text, z_ref, fps, placed=placed(0)).placed is None
    with pytest.raises(UserError, match="key frames at their places are missing; give"):
        with_places.encode(text, z_ref, fps)


@torch.no_grad()
def test_a_dropped_key_frame_is_dropped_at_its_places_too():
    video = network(base(), "microcinema", *PLACES)
    randomise(video)
    z_t, t, text, z_ref, fps = inputs(4)
    mask = torch.tensor([False, True])
    outputs = [video(z_t, t, video.encode(text, z_ref, fps, mask, placed=placed(*p))) for p in ((0, 3), (1,))]
    assert torch.equal(outputs[0][0], outputs[1][0]) and not torch.allclose(outputs[0][1], outputs[1][1])


@torch.no_grad()
def test_places_of_another_number_of_frames_are_refused():
    video = network(base(), "microcinema", *PLACES)
    z_t, t, text, z_ref, fps = inputs(4)
    with pytest.raises(UserError, match="placed in 3 frames, and the clip has 4"):
        video(z_t, t, video.encode(text, z_ref, fps, placed=placed(0, frames=3)))
