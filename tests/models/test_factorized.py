"""The parts of Factorized-Dreamer in the networks: adapter, pixel-aware attention, motion attention, PredictNet."""

import pytest
import torch
from einops import rearrange, repeat
from torch.nn import functional

from fixtures.tiny_unet import base, encoder_outputs, inputs, network, options, randomise
from microcinema.diffusion.losses import flow_loss
from microcinema.models.attention import KeyValue, attention
from microcinema.models.conditioning import Conditions
from microcinema.models.image_adapter import TextImageAdapter
from microcinema.models.pixel_attention import PixelAwareCrossAttention, PixelAwareTransformer, PixelPyramid
from microcinema.models.predict_net import PredictNet
from microcinema.models.temporal import TemporalTransformer
from microcinema.models.video_unet import VideoUNet
from microcinema.utils.errors import UserError

PARTS = {
    "adapter": ("model.adapter={mode: decoupled, num_tokens: 3}",),
    "pixels": ("model.pixels={block: transformer, scales: null}",),
    "light pixels": ("model.pixels={block: attention, scales: [1, 2]}",),
    "motion": ("model.motion_encoder=any", "model.temporal.text=true"),
}


def nets(*parts):
    """A network with these parts alone."""
    changes = [change for part in parts for change in PARTS[part]]
    return network(base(), "plain", "model.keyframe_concat=false", *changes)


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_each_part_matters_alone_and_only_through_its_own_input(part):
    video = nets(part)
    randomise(video)
    z_t, t, text, z_ref, fps = inputs(3)
    given = encoder_outputs()

    def out(**changes):
        return video(z_t, t, video.encode(text, z_ref, fps, **{**given, **changes}))

    own = {"adapter": "image_tokens", "motion": "motion_tokens"}.get(part, "pixels")
    for name in given:
        moved = (out(**{name: -given[name]}) - out()).abs().max() > 1e-4
        assert moved == (name == own), name


@pytest.mark.parametrize("pixels", ["pixels", "light pixels"])
@torch.no_grad()
def test_a_dropped_image_leaves_nothing_of_it(pixels):
    video = nets("adapter", pixels)
    randomise(video)
    z_t, t, text, z_ref, fps = inputs(3)
    given = encoder_outputs()
    dropped = video.encode(text, z_ref, fps, image_mask=torch.tensor([False, True]), **given)
    other = {**given, "image_tokens": -given["image_tokens"], "pixels": -given["pixels"]}
    out = video(z_t, t, dropped)
    for tokens in (given, other):
        again = video.encode(text, z_ref, fps, image_mask=torch.tensor([False, True]), **tokens)
        torch.testing.assert_close(video(z_t, t, again)[0], out[0])
    torch.testing.assert_close(video(z_t, t, video.encode(text, z_ref, fps, **given))[1], out[1])
    if pixels == "light pixels":  # the self-attention and feed-forward of a whole block stay
        torch.testing.assert_close(out[0], video(z_t, t, Conditions(text, fps=fps))[0])


@torch.no_grad()
def test_padding_of_the_motion_caption_is_not_read():
    video = nets("motion")
    randomise(video)
    z_t, t, text, z_ref, fps = inputs(3)
    given = encoder_outputs()
    longer = {**given, "motion_tokens": torch.cat([given["motion_tokens"], torch.zeros(2, 3, 12)], dim=1)}
    out = [video(z_t, t, video.encode(text, z_ref, fps, **tokens)) for tokens in (given, longer)]
    assert torch.allclose(*out, atol=1e-5)


@torch.no_grad()
def test_temporal_attention_reads_the_motion_caption_or_else_the_text():
    _, _, text, z_ref, fps = inputs(3)
    for video, reads_text in (
        (network(base(), "plain", "model.temporal.text=true"), True),
        (network(base(), "plain"), False),
        (nets("motion"), False),
    ):
        randomise(*video.temporal_transformers.values())
        conditions = video.encode(text, z_ref, fps, **encoder_outputs())
        h = torch.randn(6, 32, 8, 8)
        out = video.temporal_attention(0, h, 3, conditions)
        conditions.text = -text
        assert torch.equal(video.temporal_attention(0, h, 3, conditions), out) != reads_text


def test_concatenated_tokens_stand_behind_the_text():
    video = network(base(), "plain", "model.adapter={mode: concat, num_tokens: 3}")
    _, _, text, z_ref, _ = inputs(1)
    conditions = video.encode(text, z_ref, **encoder_outputs())
    assert conditions.image is None and conditions.text.shape == (2, 7 + 3, 24)
    assert torch.equal(conditions.text[:, :7], text)
    assert not torch.equal(conditions.text[0, 7:], conditions.text[1, 7:])


def test_pixel_aware_blocks_are_in_every_layer_of_the_decoder_and_the_light_ones_behind_every_transformer():
    whole, light = nets("pixels"), nets("light pixels")
    # Layers 0 to 5 of the encoder, 6 and 7 of the mid block, 8 to 16 of the decoder; transformers at scales 1 and 2, and in the mid block.
    assert [int(i) for i in whole.pixel_attentions] == list(range(8, 17))
    assert all(isinstance(block, PixelAwareTransformer) for block in whole.pixel_attentions.values())
    assert [whole.pixel_scales[str(i)] for i in range(8, 17)] == [4, 4, 4, 2, 2, 2, 1, 1, 1]
    assert [int(i) for i in light.pixel_attentions] == [0, 1, 2, 3, *range(11, 17)]


# The layers


def test_pixel_attention_finds_the_place_that_looks_alike():
    layer = PixelAwareCrossAttention(8, groups=1, feature_width=16).double()
    for conv in (layer.to_query, layer.to_out):
        torch.nn.init.eye_(conv.weight[:, :, 0, 0])
    torch.nn.init.eye_(layer.to_kv.weight)  # a feature is a key and, behind it, a value
    h = torch.randn(2 * 3, 8, 2, 2, dtype=torch.float64)
    query = rearrange(layer.norm(h), "(b f) c h w -> b (f h w) c", b=2)
    # Keys that point where the frames' own features point, far out: each place finds itself and takes the value that stands there.
    value = torch.randn(2, 12, 8, dtype=torch.float64)
    out = layer(h, torch.cat([1e4 * functional.normalize(query, dim=-1), value], dim=-1)) - h
    torch.testing.assert_close(rearrange(out, "(b f) c h w -> b (f h w) c", b=2), value)


def test_pixel_aware_transformer_is_a_transformer_block_of_diffusers_on_every_frame():
    block = PixelAwareTransformer(32, groups=4, feature_width=6)
    h, features = torch.randn(2 * 3, 32, 4, 4), torch.randn(2, 16, 6)
    with torch.no_grad():
        assert torch.equal(block(h, features), h)
        torch.nn.init.normal_(block.transformer.proj_out.weight)
        expected = block.transformer(h, encoder_hidden_states=features.repeat_interleave(3, dim=0)).sample
        torch.testing.assert_close(block(h, features), expected, atol=1e-5, rtol=1e-5)


def test_attention_is_softmax_of_scaled_products_over_what_is_not_masked():
    query, key, value = (torch.randn(2, n, 6, dtype=torch.float64) for n in (4, 5, 5))
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    found = attention(query, KeyValue(key, value, mask), heads=2)
    for head in (slice(0, 3), slice(3, 6)):
        logits = query[..., head] @ key[..., head].mT / 3**0.5
        weights = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        torch.testing.assert_close(found[..., head], weights @ value[..., head])


def test_motion_attention_reads_every_pixel_alike():
    layer = TemporalTransformer(16, 16, groups=4, max_frames=8, text_width=12, feed_forward=2)
    torch.nn.init.normal_(layer.proj_out.weight)
    h = repeat(torch.randn(2, 16), "b c -> (b f) c h w", f=3, h=2, w=2)
    motion = torch.randn(2, 4, 12)
    with torch.no_grad():
        out = layer(h, 3, motion)
        assert not torch.allclose(out, layer(h, 3), atol=1e-3)
        assert torch.allclose(out, out[..., :1, :1].expand_as(out), atol=1e-5)


def test_pyramid_gives_the_places_of_every_scale():
    torch.manual_seed(0)
    pyramid = PixelPyramid(downsampling=8, scales=[1, 4], width=16)
    features = pyramid(torch.randn(2, 3, 64, 32))
    assert [x.shape for x in features] == [(2, 32, 16), (2, 2, 64)]
    assert [pyramid.width(scale) for scale in (0.5, 1, 2, 4, 8)] == [8, 16, 32, 64, 64]
    for stage in pyramid.stages:  # without the norms, which carry a trace of each pixel everywhere
        stage[-1] = torch.nn.Identity()
    image = torch.zeros(1, 3, 64, 32)
    changed = image.clone()
    changed[..., 60, 30] = 1
    with torch.no_grad():
        moved = (pyramid(changed)[0] != pyramid(image)[0]).any(-1)[0]
    assert moved[-1] and not moved[: 4 * 4].any()  # its own place, the last, and nothing in the upper half


def test_adapter_combines_text_and_image():
    adapter = TextImageAdapter(20, 24, widths=(8,), num_tokens=3)
    text, image = torch.randn(2, 7, 24), torch.randn(2, 5, 20)
    tokens = adapter.tokens(text, image)
    assert tokens.shape == (2, 3, 24)
    assert not torch.allclose(tokens, adapter.tokens(-text, image)) and not torch.allclose(
        tokens, adapter.tokens(text, -image)
    )
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(
        adapter.tokens(text, image[:, order]), tokens
    )  # a set of tokens: order is no information


def test_predict_net_starts_still_and_sees_neighbours_only():
    net = PredictNet(6, 2, width=8)
    features = torch.randn(2 * 4, 6, 5, 5)
    flow = net(features, 4)
    assert flow.shape == (2, 3, 2, 5, 5) and not flow.any()
    torch.nn.init.normal_(net.network[-1].weight)
    changed = features.clone()
    changed[3, 0, 2] += 1  # the last frame of the first clip
    moved = (net(changed, 4) - net(features, 4)).abs().amax(dim=(2, 3, 4)) > 0
    assert moved.tolist() == [[False, False, True], [False, False, False]]
    assert net(features[:2], 1).shape == (2, 0, 2, 5, 5)  # one frame has no neighbour


def drifting_blob(clips: int, seed: int, frames: int = 4, grid: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Loud features (b f) 8 h w of one soft blob a clip on a constant ground, and its flow: most places stand still."""
    random = torch.Generator().manual_seed(seed)
    start = 2 + 4 * torch.rand(clips, 1, 2, generator=random)
    speed = 0.6 * (torch.rand(clips, 1, 2, generator=random) - 0.5)
    distance = torch.arange(grid) - (start + speed * torch.arange(frames)[None, :, None])[..., None]
    x, y = torch.exp(-distance.square() / 2).unbind(2)
    blob = y[..., :, None] * x[..., None, :]
    features = 20 * (2 + blob[:, :, None] * torch.linspace(-1, 1, 8)[:, None, None])
    return features.flatten(0, 1), speed[..., None, None] * (blob[:, :-1, None] > 0.4)


def test_predict_net_learns_motion_from_loud_features_of_a_world_that_mostly_stands_still():
    torch.manual_seed(0)
    net = PredictNet(8, 2, width=32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(150):
        features, flow = drifting_blob(16, seed=1 + step)
        flow_loss(net(features, 4), flow, torch.ones(16, 3, 8, 8, dtype=torch.bool)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    features, flow = drifting_blob(32, seed=0)
    error = (net(features, 4) - flow).norm(dim=2).mean() / flow.norm(dim=2).mean()
    assert error < 0.65  # without the norm it stays above 1 for thousands of steps


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.adapter.mode=magic"], "model.adapter.mode is 'magic', but should be 'decoupled' or 'concat'"),
        (["model.adapter.num_tokens=0"], "should be greater than or equal to 1"),
        (["model.pixels.scales=[1,8]"], r"pixels.scales has 8, but there are layers for it only at \[1, 2, 4\]"),
        (["model.pixels.scales=[2,1]"], "rising powers of two"),
        (
            ["model.temporal.attention_bottleneck=1000"],
            "attention_bottleneck=1000 leaves layers no channel; use at most",
        ),
        (["model.temporal.text=false"], "motion encoder's tokens are for temporal attention; set temporal.text=true"),
    ],
)
def test_parts_that_cannot_work_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        network(base(), "factorized_dreamer", *changes)


def test_an_adapter_needs_an_image_encoder():
    with pytest.raises(UserError, match="adapter=decoupled needs an image encoder"):
        VideoUNet.from_unet2d(base(), options("factorized_dreamer"), motion_width=12)


@pytest.mark.parametrize(
    ("part", "missing", "words"),
    [
        ("adapter", "image_tokens", "image tokens"),
        ("pixels", "pixels", "pixels"),
        ("motion", "motion_tokens", "motion"),
    ],
)
def test_what_a_part_reads_must_be_given(part, missing, words):
    _, _, text, z_ref, fps = inputs(1)
    with pytest.raises(UserError, match=words):
        nets(part).encode(text, z_ref, fps, **{**encoder_outputs(), missing: None})
