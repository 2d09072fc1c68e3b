import pytest
import torch

from microcinema.models.conditioning import ConditionEncoder
from microcinema.utils.errors import UserError


def trained_encoder(unet, **options):
    """An encoder whose projections are no longer zero."""
    encoder = ConditionEncoder.from_unet2d(unet, **options)
    if encoder.appearance_net is not None:
        for projection in encoder.appearance_net.projections:
            torch.nn.init.normal_(projection.weight)
    return encoder.eval()


def inputs(b=2):
    generator = torch.Generator().manual_seed(1)
    text, z_ref = torch.randn(b, 5, 12, generator=generator), torch.randn(b, 4, 8, 8, generator=generator)
    return text, z_ref, torch.full((b,), 8.0)


@torch.no_grad()
def test_a_dropped_image_leaves_zeros_and_the_other_clip_as_it_was(unet):
    encoder = trained_encoder(unet, fusion="spade", keyframe_concat=True)
    text, z_ref, fps = inputs()
    kept = encoder(text, z_ref, fps)
    dropped = encoder(text, z_ref, fps, image_mask=torch.tensor([False, True]))
    for whole, part in zip((*kept.appearance, kept.keyframe), (*dropped.appearance, dropped.keyframe), strict=True):
        assert whole[0].any()
        assert not part[0].any()
        assert torch.equal(whole[1], part[1])
    assert torch.equal(dropped.text, text)
    assert torch.equal(dropped.fps, fps)


def test_what_is_switched_off_is_none(unet):
    text, z_ref, fps = inputs()
    plain = ConditionEncoder.from_unet2d(unet, fusion=None)(text, z_ref)
    assert plain.appearance is None
    assert plain.keyframe is None
    assert plain.fps is None
    assert ConditionEncoder.from_unet2d(unet, fusion=None, keyframe_concat=True)(text, z_ref, fps).keyframe is z_ref
    with pytest.raises(UserError, match="same b"):
        ConditionEncoder.from_unet2d(unet, fusion=None)(text, z_ref[:1])


@pytest.mark.parametrize("fusion", [None, "add"])
@torch.no_grad()
def test_save_and_load(unet, tmp_path, fusion):
    encoder = trained_encoder(unet, fusion=fusion, inject="decoder", keyframe_concat=True)
    encoder.save_pretrained(tmp_path)
    again = ConditionEncoder.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    text, z_ref, fps = inputs()
    one, two = encoder(text, z_ref, fps), again(text, z_ref, fps)
    assert torch.equal(one.keyframe, two.keyframe)
    for x, y in zip(one.appearance or (), two.appearance or (), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("fusion", [None, "add"])
def test_gradient_checkpointing_can_be_asked_for_with_and_without_networks(unet, fusion):
    encoder = ConditionEncoder.from_unet2d(unet, fusion=fusion)
    encoder.enable_gradient_checkpointing()
    assert encoder.is_gradient_checkpointing


def test_load_from_nowhere(tmp_path):
    with pytest.raises(UserError, match="cannot load a network from"):
        ConditionEncoder.from_pretrained(tmp_path / "nowhere")
