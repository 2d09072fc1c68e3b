"""MicroCinema's AppearNet and its injections, box by box of the authors' figures; and ReferenceNet, which is ours."""

import pytest
import torch
from einops import rearrange, repeat
from torch.nn import functional

from fixtures.tiny_unet import base, inputs, network, randomise
from microcinema.models.appearance import AppearanceEmbedding, Injection, combine, embedding_sources, fuse
from microcinema.models.unet2d import layer_specs

# `unet` has two levels with one layer each: layers 0, 1 of the encoder, 2, 3 of the mid block, 4 to 7 of the decoder.
WIDTHS = {"encoder": [16, 32, 32, 32], "decoder": [32, 32, 16, 16], "both": [16, 32, 32, 32, 32, 32, 16, 16]}


# AppearNet


def test_every_embedding_enters_encoder_and_decoder_at_its_own_resolution(unet):
    # Skip connections, in the order of the decoder: of layer 1, of the downsampler behind layer 0, of layer 0, of conv_in.
    both = {0: (0,), 1: (1, 3), 4: (1, 3), 5: (1,), 6: (0,), 7: (0,)}
    assert embedding_sources(unet, "both") == both
    assert embedding_sources(unet, "encoder") == {k: v for k, v in both.items() if k < 2}
    assert embedding_sources(unet, "decoder") == {k: v for k, v in both.items() if k > 3}


@pytest.mark.parametrize("shape", ["sd1", "sd2"])
def test_sources_have_the_size_of_their_layer_and_all_are_used(shape):
    unet = base(shape)
    specs, sources = layer_specs(unet), embedding_sources(unet, "both")
    assert len(specs) == 17  # 3 levels of 2 layers, 2 of the mid block, 3 levels of 3 layers
    assert sources.keys() == set(range(17)) - {6, 7}
    for layer, layers in sources.items():
        for source in layers:
            assert specs[source].width == specs[layer].width and specs[source].scale == specs[layer].scale
    assert {source for layers in sources.values() for source in layers} == {0, 1, 2, 3, 4, 5, 7}


@torch.no_grad()
def test_appear_net_is_the_2d_encoder_and_mid_block_on_noisy_latents_plus_the_projected_key_frame(unet):
    unet.eval()
    video = network(unet, "microcinema")
    torch.nn.init.normal_(video.appear_net.keyframe_conv.weight)
    z_t, t, _, z_ref, fps = inputs(3)
    text = torch.randn(2, 5, 12)
    resnets = [unet.down_blocks[0].resnets[0], unet.down_blocks[1].resnets[0], *unet.mid_block.resnets]
    attentions = {0: unet.down_blocks[0].attentions[0], 2: unet.mid_block.attentions[0]}
    outputs = {}

    def keep(kind, number):
        return lambda module, args, out: outputs.update({(kind, number): out if torch.is_tensor(out) else out[0]})

    hooks = [net.register_forward_hook(keep("resnet", i)) for i, net in enumerate(resnets)]
    hooks += [net.register_forward_hook(keep("attention", i)) for i, net in attentions.items()]
    projected = functional.conv2d(z_ref, video.appear_net.keyframe_conv.weight)
    frames = rearrange(z_t + projected[:, None], "b f c h w -> (b f) c h w")
    unet(frames, t.repeat_interleave(3), repeat(text, "b n d -> (b f) n d", f=3))
    for hook in hooks:
        hook.remove()
    embeddings = video.appear_net(z_t, t, video.encode(text, z_ref, fps))
    assert len(embeddings) == 4
    for i, embedding in enumerate(embeddings):
        torch.testing.assert_close(embedding.resnet, outputs["resnet", i], atol=1e-5, rtol=1e-5)
        assert (embedding.attention is None) == (i not in attentions)
        if i in attentions:
            torch.testing.assert_close(embedding.attention, outputs["attention", i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_appear_net_reads_text_time_noise_and_key_frame_and_passes_motion_between_frames():
    video = network(base(), "microcinema")
    randomise(video)
    z_t, t, text, z_ref, fps = inputs(3)

    def last(z_t=z_t, t=t, text=text, z_ref=z_ref):
        embedding = video.appear_net(z_t, t, video.encode(text, z_ref, fps))[-1].resnet
        return rearrange(embedding, "(b f) c h w -> b f c h w", b=2)

    for changes in ({"z_t": -z_t}, {"t": t + 50}, {"text": -text}, {"z_ref": -z_ref}):
        assert (last(**changes) - last()).abs().max() > 1e-3, list(changes)
    other = z_t.clone()
    other[:, 2] = 0
    assert (last(z_t=other) - last())[:, 0].abs().max() > 1e-5


@pytest.mark.parametrize(("preset", "calls"), [("microcinema", 3), ("microcinema_once", 1)])
@torch.no_grad()
def test_the_authors_branch_runs_at_every_step_and_ours_once_per_clip(preset, calls):
    video = network(base(), preset)
    branch, count = video.appear_net if preset == "microcinema" else video.reference_net, []
    branch.register_forward_hook(lambda *_: count.append(1))
    z_t, _, text, z_ref, fps = inputs(2)
    conditions = video.encode(text, z_ref, fps)
    for t in (900, 500, 100):
        video(z_t, t, conditions)
    assert len(count) == calls


# Injection


@torch.no_grad()
def test_scale_and_shift_lie_between_norm_and_silu_of_the_second_temporal_layer():
    """The block of the figure, written out for one clip: h_bar gamma + beta + h_bar, SiLU, 3x1x1 convolution, residual."""
    video = network(base(), "microcinema").double()
    randomise(video)
    number, frames = 0, 3
    resnet, emb = video.down_blocks[0].resnets[0], torch.randn(frames, 128, dtype=torch.float64)
    h = torch.randn(frames, 32, 4, 4, dtype=torch.float64)
    embedding = torch.randn(frames, 32, 4, 4, dtype=torch.float64)
    injection = video.injections[str(number)]

    def conv(layer, x):
        to_next, to_self, to_previous = layer.taps.weight.chunk(3)
        weight = torch.stack([to_next, to_self, to_previous], dim=2)[:, :, :, 0, 0][..., None, None]
        x = functional.conv3d(rearrange(x, "f c h w -> 1 c f h w"), weight, padding=(1, 0, 0))
        return rearrange(x, "1 c f h w -> f c h w")

    def norm(layer, x):
        clip = rearrange(x, "f c h w -> 1 c (f h w)")
        return rearrange(layer.norm(clip), "1 c (f h w) -> f c h w", f=frames, h=4)

    first, second = video.temporal_first_convs[number], video.temporal_second_convs[number]
    x = resnet.conv1(functional.silu(resnet.norm1(h)))
    x = x + conv(first, functional.silu(norm(first, x)))
    x = x + resnet.time_emb_proj(functional.silu(emb))[..., None, None]
    x = resnet.conv2(functional.silu(resnet.norm2(x)))
    h_bar = norm(second, x)
    gamma, beta = injection.to_scale_shift(functional.silu(injection.projector(embedding))).chunk(2, dim=1)
    expected = h + x + conv(second, functional.silu(h_bar * gamma + beta + h_bar))
    out = video.res_block(number, resnet, h, functional.silu(emb), frames, injection.scale_shift(embedding))
    torch.testing.assert_close(out, expected)


@torch.no_grad()
def test_an_embedding_changes_exactly_the_layers_that_it_enters(unet):
    """Scale-and-shift and addition of one AppearNet layer, seen in the outputs of the ResNet and attention blocks that they reach."""
    video = network(unet, "microcinema", "model.appearance.fusion=both")
    randomise(video.injections, video.temporal_second_convs)
    calls = []
    for target, injection in video.injections.items():
        injection.scale_shift = (lambda t: lambda embedding: calls.append((t, "scale_shift", embedding)) or None)(
            target
        )
        injection.add = (lambda t: lambda h, embedding: calls.append((t, "add", embedding)) or h)(target)
    _, t, _, z_ref, fps = inputs(2)
    fields = [AppearanceEmbedding(torch.full((1,), float(i)), torch.full((1,), 10.0 + i)) for i in range(4)]
    fields[1], fields[3] = fields[1]._replace(attention=None), fields[3]._replace(attention=None)
    video.appear_net.forward = lambda *_: fields
    z_t = torch.randn(2, 2, 4, 8, 8)
    video(z_t, t, video.encode(torch.randn(2, 5, 12), z_ref, fps))
    entered = {(t, kind): None if value is None else value.item() for t, kind, value in calls}
    sources = {"0": 0, "1": 1 + 3, "4": 1 + 3, "5": 1, "6": 0, "7": 0}
    assert {t: value for (t, kind), value in entered.items() if kind == "scale_shift"} == sources
    attention = {"0": 10, "1": None, "4": None, "5": None, "6": 10, "7": 10}
    assert {t: value for (t, kind), value in entered.items() if kind == "add"} == attention


def test_combine_is_the_sum_over_sources():
    one, two = (AppearanceEmbedding(torch.tensor([x]), None) for x in (1.0, 2.0))
    three = AppearanceEmbedding(torch.tensor([4.0]), torch.tensor([8.0]))
    assert combine([one, two, three], (1,)) == two
    assert combine([one, two, three], (0, 2)) == (torch.tensor([5.0]), torch.tensor([8.0]))


@pytest.mark.parametrize(
    ("fusion", "names"),
    [
        ("scale_shift", {"projector", "to_scale_shift"}),
        ("add", {"to_sum"}),
        ("both", {"projector", "to_scale_shift", "to_sum"}),
    ],
)
def test_injection_has_the_projections_of_its_fusion_and_starts_at_zero(fusion, names):
    injection = Injection(8, fusion, has_attention=True)
    h, embedding = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    assert {name for name, _ in injection.named_children()} == names
    scale_shift = injection.scale_shift(embedding)
    assert scale_shift is None if fusion == "add" else not scale_shift.any()
    assert torch.equal(injection.add(h, embedding), h)
    assert "to_sum" not in dict(Injection(8, fusion, has_attention=False).named_children())


# ReferenceNet


def identity_projections(net):
    for projection in net.projections:
        with torch.no_grad():
            projection.weight.copy_(torch.eye(projection.in_channels)[..., None, None])
    return net.eval()


def reference_net(unet, *changes):
    return network(unet, "microcinema_once", *changes).reference_net


@pytest.mark.parametrize("fusion", ["add", "scale_shift"])
@pytest.mark.parametrize("inject", ["encoder", "decoder", "both"])
def test_features_are_zero_at_the_start_and_shaped_for_their_layers(unet, inject, fusion):
    net = reference_net(unet, f"model.appearance.inject={inject}", f"model.appearance.fusion={fusion}")
    features = net(torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12))
    factor = 2 if fusion == "scale_shift" else 1
    assert [x.shape[1] for x in features] == [factor * width for width in WIDTHS[inject]]
    assert {x.shape[0] for x in features} == {2}
    assert not any(x.any() for x in features)


@torch.no_grad()
def test_features_are_those_of_the_2d_unet_at_time_zero(unet):
    unet.eval()
    z_ref, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    outputs = {}
    blocks = [unet.down_blocks[0].attentions[0], unet.down_blocks[1].resnets[0], unet.mid_block.attentions[0]]
    blocks += [unet.mid_block.resnets[1], *unet.up_blocks[0].resnets, *unet.up_blocks[1].attentions]

    def keep(number):
        return lambda module, args, out: outputs.update({number: out if torch.is_tensor(out) else out[0]})

    hooks = [block.register_forward_hook(keep(number)) for number, block in enumerate(blocks)]
    unet(z_ref, 0, text)
    for hook in hooks:
        hook.remove()
    features = identity_projections(reference_net(unet))(z_ref, text)
    assert len(features) == len(outputs) == 8
    for number, feature in enumerate(features):
        torch.testing.assert_close(feature, outputs[number], atol=1e-5, rtol=1e-5)


def test_only_needed_layers_are_built_and_all_are_trained(unet):
    encoder = reference_net(unet, "model.appearance.inject=encoder")
    assert not any(key.startswith(("up_blocks", "conv_out", "conv_norm_out")) for key in encoder.state_dict())
    for inject in WIDTHS:
        net = identity_projections(reference_net(unet, f"model.appearance.inject={inject}"))
        sum(x.square().mean() for x in net(torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12))).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("fusion", ["add", "scale_shift"])
def test_fuse_is_its_equation_and_the_identity_for_zero(fusion):
    h = torch.randn(2 * 3, 8, 4, 4, dtype=torch.float64)
    feature = torch.randn(2, 8 if fusion == "add" else 16, 4, 4, dtype=torch.float64)
    each = feature.repeat_interleave(3, dim=0)
    if fusion == "add":
        expected = h + each
    else:
        expected = h + functional.group_norm(h, 2) * each[:, :8] + each[:, 8:]
    torch.testing.assert_close(fuse(h, feature, fusion, groups=2), expected)
    assert torch.equal(fuse(h, torch.zeros_like(feature), fusion, groups=2), h)
