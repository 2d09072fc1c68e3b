import pytest
import torch
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file

from fixtures.tiny_unet import base, inputs, per_frame, randomise
from microcinema.models.conditioning import ConditionEncoder, Conditions
from microcinema.models.video_unet import VideoUNet, set_trainable
from microcinema.utils.errors import UserError


def nets(unet, fusion="add", inject="both", keyframe_concat=False, **options):
    """A VideoUNet and its ConditionEncoder, in evaluation mode."""
    channels = unet.config.in_channels if keyframe_concat else 0
    video = VideoUNet.from_unet2d(unet, fusion=fusion, inject=inject, keyframe_channels=channels, **options)
    encoder = ConditionEncoder.from_unet2d(unet, fusion=fusion, inject=inject, keyframe_concat=keyframe_concat)
    return video.eval(), encoder.eval()


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


@pytest.mark.parametrize("known", [True, False])
@torch.no_grad()
def test_every_block_may_know_the_number_of_its_frame(known):
    video = VideoUNet.from_unet2d(base(), frame_conditioning=known).eval()
    assert (not hasattr(video, "frame_embedding")) != known
    if known:
        randomise(video.frame_embedding)
    z_t, t, text, _, _ = inputs(1)
    out = video(
        z_t.expand(-1, 4, -1, -1, -1), t, Conditions(text)
    )  # four frames alike, and no temporal layer that matters
    assert torch.allclose(out[:, :1].expand_as(out), out, atol=1e-5) != known


@pytest.mark.parametrize("trainable_unet_layers", [[], ["up_blocks.1", "conv_out.bias"]])
def test_frozen_parts_get_no_gradient_no_optimiser_entry_and_keep_their_bytes(trainable_unet_layers):
    video, encoder = nets(base(), keyframe_concat=True)
    trained = set_trainable(video, encoder, "temporal", trainable_unet_layers)
    randomise(video, encoder)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    before = {k: v.clone() for k, v in video.state_dict().items()}
    z_t, t, text, z_ref, fps = inputs(3)
    video(z_t, t, encoder(text, z_ref, fps)).square().mean().backward()
    optimizer.step()
    entries = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in video.named_parameters():
        trains = name.startswith((*VideoUNet.new_prefixes, *trainable_unet_layers))
        assert (id(parameter) in entries) == (parameter.grad is not None) == trains, name
        assert torch.equal(parameter, before[name]) != trains, name
    assert all(p.grad is not None and id(p) in entries for p in encoder.parameters())


def test_train_all_trains_everything():
    video, encoder = nets(base())
    set_trainable(video, encoder, "temporal")
    for trainable_unet_layers in ([], ["up_blocks.1"]):
        trained = set_trainable(video, encoder, "all", trainable_unet_layers)
        assert len(trained) == len([*video.parameters(), *encoder.parameters()])
    with pytest.raises(UserError, match="trainable_parameters='some'"):
        set_trainable(video, encoder, "some")


@pytest.mark.parametrize("name", ["up_block", "up_blocks.7", "temporal_transformers", ""])
def test_what_is_to_train_must_be_a_frozen_layer(name):
    video, encoder = nets(base())
    with pytest.raises(
        UserError, match=f"trainable_unet_layers names '{name}', and no 2D layer has that name.*mid_block, "
    ):
        set_trainable(video, encoder, "temporal", [name])


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


@pytest.mark.parametrize("inject", ["encoder", "decoder"])
@torch.no_grad()
def test_equals_the_2d_unet_with_part_of_the_injection_or_none(inject):
    unet = base()
    z_t, t, text, z_ref, fps = inputs(3)
    expected = per_frame(unet, z_t, t, text)
    video, encoder = nets(unet, "add", inject)
    assert (video(z_t, t, encoder(text, z_ref, fps)) - expected).abs().max() < 1e-5
    assert (VideoUNet.from_unet2d(unet).eval()(z_t, t, Conditions(text)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape", ["sd1", "sd2"])
def test_2d_part_has_the_2d_names_shapes_and_values(shape):
    unet = base(shape)
    video, _ = nets(unet, keyframe_concat=True)
    state = video.state_dict()
    assert {k for k in state if not k.startswith(VideoUNet.new_prefixes)} == unet.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in unet.state_dict().items())
    assert len(video.new_parameters()) == len(state) - len(unet.state_dict())


def test_loading_other_weights_names_all_keys():
    unet = base()
    state = unet.state_dict()
    state["conv_in.extra"] = state.pop("conv_in.bias")
    unet.state_dict = lambda: state
    with pytest.raises(UserError, match=r"missing keys: conv_in\.bias; unexpected keys: conv_in\.extra"):
        VideoUNet.from_unet2d(unet)


def test_a_checkpoint_without_a_key_is_refused(tmp_path):
    video, _ = nets(base())
    video.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["other"] = state.pop("temporal_convs.0.taps.weight")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys: temporal_convs\.0\.taps\.weight; unexpected keys: other"):
        VideoUNet.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot load a network from"):
        VideoUNet.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text'"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"),
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")}, "AttnDownBlock2D"),
    ],
)
def test_unsupported_base_is_named(changes, message):
    unet = base(**changes)
    for net in (VideoUNet, ConditionEncoder):
        with pytest.raises(UserError, match=message):
            net.from_unet2d(unet)


@torch.no_grad()
def test_text_once_per_clip_is_text_repeated_per_frame():
    """Each frame's text is a clip's own in a batch of one-frame clips; without temporal layers both must agree."""
    video = VideoUNet.from_unet2d(base()).eval()
    z_t, t, text, _, _ = inputs(4)
    seen = []
    hook = (
        video.mid_block.attentions[0]
        .transformer_blocks[0]
        .attn2.to_k.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    )
    once = video(z_t, t, Conditions(text))
    repeated = video(
        rearrange(z_t, "b f c h w -> (b f) 1 c h w"),
        t.repeat_interleave(4),
        Conditions(repeat(text, "b n d -> (b f) n d", f=4)),
    )
    hook.remove()
    torch.testing.assert_close(once, rearrange(repeated, "(b f) 1 c h w -> b f c h w", f=4), atol=1e-5, rtol=1e-5)
    assert seen == [2, 8]


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other():
    video, encoder = nets(base(), "spade", keyframe_concat=True)
    randomise(video, encoder)
    z_t, t, text, z_ref, fps = inputs(3)
    fps = torch.tensor([4.0, 24.0])
    batch = video(z_t, t, encoder(text, z_ref, fps))
    for i in range(2):
        one = slice(i, i + 1)
        alone = video(z_t[one], t[one], encoder(text[one], z_ref[one], fps[one]))
        torch.testing.assert_close(batch[one], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_condition_matters_once_trained():
    video, encoder = nets(base(), keyframe_concat=True)
    randomise(video, encoder)
    z_t, t, text, z_ref, fps = inputs(3)
    out = video(z_t, t, encoder(text, z_ref, fps))
    no_image = encoder(text, z_ref, fps, image_mask=torch.zeros(2, dtype=torch.bool))
    nothing = Conditions(text=text, fps=fps)
    torch.testing.assert_close(video(z_t, t, no_image), video(z_t, t, nothing))
    for other in (no_image, encoder(text, z_ref, fps + 8), encoder(text + 1, z_ref, fps), encoder(text, -z_ref, fps)):
        assert (video(z_t, t, other) - out).abs().max() > 1e-3
    assert torch.equal(video(z_t, 10, encoder(text, z_ref, fps))[:1], out[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_runs_in_half_precision(dtype):
    video, encoder = nets(base(), "spade", keyframe_concat=True)
    randomise(video, encoder)
    z_t, t, text, z_ref, fps = inputs(2)
    expected = video(z_t, t, encoder(text, z_ref, fps))
    video, encoder = video.to(dtype), encoder.to(dtype)
    out = video(z_t.to(dtype), t, encoder(text.to(dtype), z_ref.to(dtype), fps))
    assert out.dtype == dtype
    assert (out.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_trains_under_autocast_and_checkpointing():
    video, encoder = nets(base(), "spade", keyframe_concat=True)
    randomise(video, encoder)
    video.enable_gradient_checkpointing()
    encoder.enable_gradient_checkpointing()
    z_t, t, text, z_ref, fps = inputs(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = video(z_t, t, encoder(text, z_ref, fps))
    out.float().square().mean().backward()
    for parameter in (*video.parameters(), *encoder.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 0, 4, 8, 8), "0 frames; this model takes 1 to 6"),
        ((1, 7, 4, 8, 8), "7 frames; this model takes 1 to 6"),
        ((1, 2, 4, 8, 6), "8x6; height and width must be multiples of 4"),
        ((1, 2, 4, 0, 8), "0x8"),
        ((1, 2, 3, 8, 8), "c=4"),
        ((2, 4, 8, 8), "b f c h w"),
        ((2, 2, 4, 8, 8), "1 texts for 2 clips"),
    ],
)
def test_bad_latents(shape, message):
    video = VideoUNet.from_unet2d(base(), max_frames=6)
    with pytest.raises(UserError, match=message):
        video(torch.zeros(shape), 0, Conditions(torch.zeros(1, 7, 24)))


def test_conditions_of_another_model():
    unet = base()
    z_t, t, text, z_ref, fps = inputs(2)
    conditions = ConditionEncoder.from_unet2d(unet, inject="encoder", keyframe_concat=True)(text, z_ref, fps)
    with pytest.raises(UserError, match="8 appearance features and the model has 0 layers"):
        VideoUNet.from_unet2d(unet)(z_t, t, conditions)
    conditions.appearance = None
    with pytest.raises(UserError, match="keyframe_channels=0"):
        VideoUNet.from_unet2d(unet)(z_t, t, conditions)


@pytest.mark.parametrize("choice", [{"fusion": "add"}, {"inject": "both"}, {"fusion": "x", "inject": "both"}])
def test_bad_injection(choice):
    with pytest.raises(UserError, match="fusion="):
        VideoUNet.from_unet2d(base(), **choice)


@pytest.mark.parametrize("bottleneck", [1, 2])
def test_temporal_bottleneck(bottleneck):
    video = VideoUNet.from_unet2d(base(), temporal_bottleneck=bottleneck)
    assert video.temporal_transformers["0"].proj_in.out_channels == 32 // bottleneck
