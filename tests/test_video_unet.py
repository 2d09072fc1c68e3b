import pytest
import torch
from diffusers import UNet2DConditionModel
from einops import rearrange, repeat

from microcinema.errors import UserError
from microcinema.models import ConditionEncoder, VideoUNet, set_trainable

torch.set_num_threads(1)

SD1 = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
SD2 = SD1 | {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "upcast_attention": True}
SHAPES = {"sd1": SD1, "sd2": SD2}


def base(shape="sd1", **changes):
    torch.manual_seed(0)
    return UNet2DConditionModel(**(SHAPES[shape] | changes)).eval()


def nets(unet, fusion="add", inject="both", keyframe_concat=False, **options):
    """A VideoUNet and its ConditionEncoder, in evaluation mode."""
    channels = unet.config.in_channels if keyframe_concat else 0
    video = VideoUNet.from_unet2d(unet, fusion=fusion, inject=inject, keyframe_channels=channels, **options)
    encoder = ConditionEncoder.from_unet2d(unet, fusion=fusion, inject=inject, keyframe_concat=keyframe_concat)
    return video.eval(), encoder.eval()


def inputs(frames, b=2, size=8):
    generator = torch.Generator().manual_seed(1)
    z_t = torch.randn(b, frames, 4, size, size, generator=generator)
    text = torch.randn(b, 7, 24, generator=generator)
    z_ref = torch.randn(b, 4, size, size, generator=generator)
    t = torch.tensor([10, 900])[:b]
    return z_t, t, text, z_ref, torch.full((b,), 8.0)


def per_frame(unet, z_t, t, text):
    f = z_t.shape[1]
    out = unet(
        rearrange(z_t, "b f c h w -> (b f) c h w"), t.repeat_interleave(f), repeat(text, "b n d -> (b f) n d", f=f)
    ).sample
    return rearrange(out, "(b f) c h w -> b f c h w", f=f)


def randomise(*modules):
    """Takes the networks away from their zero-initialised start, where half of them would not matter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("frames", [1, 5, 16])
@pytest.mark.parametrize("fusion", ["add", "spade"])
@pytest.mark.parametrize("shape", ["sd1", "sd2"])
@torch.no_grad()
def test_equals_the_2d_unet_at_initialisation(shape, fusion, frames):
    unet = base(shape)
    video, encoder = nets(unet, fusion, keyframe_concat=True)
    z_t, t, text, z_ref, fps = inputs(frames)
    out = video(z_t, t, encoder(text, z_ref, fps))
    assert (out - per_frame(unet, z_t, t, text)).abs().max() < 1e-5


@pytest.mark.parametrize("fusion", ["add", "spade"])
@torch.no_grad()
def test_saves_and_loads_bit_for_bit(tmp_path, fusion):
    video, encoder = nets(base(), fusion, keyframe_concat=True)
    randomise(video, encoder)
    video.save_pretrained(tmp_path / "unet")
    encoder.save_pretrained(tmp_path / "condition_encoder")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    again, encoder_again = (
        VideoUNet.from_pretrained(tmp_path / "unet"),
        ConditionEncoder.from_pretrained(tmp_path / "condition_encoder"),
    )
    for net, other in ((video, again), (encoder, encoder_again)):
        assert net.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items())
    z_t, t, text, z_ref, fps = inputs(3)
    assert torch.equal(video(z_t, t, encoder(text, z_ref, fps)), again(z_t, t, encoder_again(text, z_ref, fps)))


def test_frozen_parts_get_no_gradient_no_optimiser_entry_and_keep_their_bytes():
    video, encoder = nets(base(), keyframe_concat=True)
    trained = set_trainable(video, encoder, "temporal")
    randomise(video, encoder)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    before = {k: v.clone() for k, v in video.state_dict().items()}
    z_t, t, text, z_ref, fps = inputs(3)
    video(z_t, t, encoder(text, z_ref, fps)).square().mean().backward()
    optimizer.step()
    entries = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in video.named_parameters():
        added = name.startswith(VideoUNet.added)
        assert (id(parameter) in entries) == (parameter.grad is not None) == added, name
        assert torch.equal(parameter, before[name]) != added, name
    assert all(p.grad is not None and id(p) in entries for p in encoder.parameters())


def test_train_all_trains_everything():
    video, encoder = nets(base())
    set_trainable(video, encoder, "temporal")
    assert len(set_trainable(video, encoder, "all")) == len([*video.parameters(), *encoder.parameters()])
    with pytest.raises(UserError, match="train='some'"):
        set_trainable(video, encoder, "some")


@pytest.mark.parametrize("fusion", ["add", "spade"])
def test_gradient_checkpointing_changes_no_gradient(fusion):
    video, encoder = nets(base(), fusion)
    randomise(video, encoder)
    z_t, t, text, z_ref, fps = inputs(3)

    def gradients():
        video.zero_grad()
        encoder.zero_grad()
        video(z_t, t, encoder(text, z_ref, fps)).square().mean().backward()
        return [p.grad.clone() for p in (*video.parameters(), *encoder.parameters())]

    plain = gradients()
    video.enable_gradient_checkpointing()
    encoder.enable_gradient_checkpointing()
    assert video.gradient_checkpointing
    assert encoder.appearance_net.gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
