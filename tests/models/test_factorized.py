"""The parts of Factorized-Dreamer in the networks: adapter, pixel-aware attention, motion attention, PredictNet."""

import pytest
import torch
from einops import rearrange, repeat
from torch.nn import functional

from fixtures.tiny_unet import base, inputs, per_frame, randomise
from microcinema.diffusion.losses import flow_loss
from microcinema.models.attention import KeyValue, attention
from microcinema.models.conditioning import ConditionEncoder, Conditions
from microcinema.models.image_adapter import TextImageAdapter
from microcinema.models.pixel_attention import PixelAwareCrossAttention, PixelPyramid
from microcinema.models.predict_net import PredictNet
from microcinema.models.temporal import TemporalTransformer
from microcinema.models.video_unet import VideoUNet, set_trainable
from microcinema.utils.errors import UserError

PARTS = {
    "adapter": ({"image_attention": True}, {"adapter": "decoupled", "image_width": 20, "num_image_tokens": 3}),
    "pixels": ({"pixel_scales": (1, 2)}, {"pixel_scales": (1, 2), "vae_scale_factor": 4}),
    "motion": ({"motion_attention": True}, {"motion_attention": True, "motion_width": 12}),
}


def nets(unet, parts=tuple(PARTS), fusion=None, **options):
    video_options, encoder_options = {}, {}
    for part in parts:
        video_options |= PARTS[part][0]
        encoder_options |= PARTS[part][1]
    inject = None if fusion is None else "both"
    video = VideoUNet.from_unet2d(unet, fusion=fusion, inject=inject, **video_options, **options)
    return video.eval(), ConditionEncoder.from_unet2d(unet, fusion=fusion, inject=inject, **encoder_options).eval()


def _said(b):
    return torch.arange(6) < torch.tensor([[4], [6]])[:b]


def given(b=2):
    """What the frozen encoders say of b clips: patch tokens, pixels, motion tokens, of which some are padding."""
    source = torch.Generator().manual_seed(3)
    return {
        "image_tokens": torch.randn(b, 5, 20, generator=source),
        "pixels": torch.randn(b, 3, 32, 32, generator=source).clamp(-1, 1),
        "motion_tokens": torch.randn(b, 6, 12, generator=source) * _said(b)[..., None],
    }


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("fusion", [None, "add"])
@pytest.mark.parametrize("shape", ["sd1", "sd2"])
@torch.no_grad()
def test_with_all_parts_on_it_still_equals_the_2d_unet_at_initialisation(shape, fusion, frames):
    unet = base(shape)
    video, encoder = nets(unet, fusion=fusion)
    z_t, t, text, z_ref, fps = inputs(frames)
    conditions = encoder(text, z_ref, fps, **given())
    assert len(conditions.image) == len(conditions.motion) > len(conditions.pixels) > 0
    assert (video(z_t, t, conditions) - per_frame(unet, z_t, t, text)).abs().max() < 1e-5


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_each_part_matters_alone_and_only_through_what_it_reads(part):
    video, encoder = nets(base(), (part,))
    randomise(video, encoder)
    z_t, t, text, z_ref, fps = inputs(3)
    told = given()

    def out(**changes):
        return video(z_t, t, encoder(text, z_ref, fps, **{**told, **changes}))

    mine = {"adapter": "image_tokens", "pixels": "pixels", "motion": "motion_tokens"}[part]
    for name in ("image_tokens", "pixels", "motion_tokens"):
        moved = (out(**{name: -told[name]}) - out()).abs().max() > 1e-4
        assert moved == (name == mine), name


@torch.no_grad()
def test_a_dropped_image_leaves_nothing_of_adapter_and_pixels():
    video, encoder = nets(base(), ("adapter", "pixels"))
    randomise(video, encoder)
    z_t, t, text, z_ref, fps = inputs(3)
    dropped = encoder(text, z_ref, fps, image_mask=torch.tensor([False, True]), **given())
    bare = Conditions(text, fps=fps)
    kept = encoder(text, z_ref, fps, **given())
    out = video(z_t, t, dropped)
    assert torch.allclose(out[0], video(z_t, t, bare)[0], atol=1e-6)
    assert torch.allclose(out[1], video(z_t, t, kept)[1], atol=1e-6)


@torch.no_grad()
def test_padding_of_the_motion_caption_is_not_read():
    video, encoder = nets(base(), ("motion",))
    randomise(video, encoder)
    z_t, t, text, z_ref, fps = inputs(3)
    told = given()
    longer = {**told, "motion_tokens": torch.cat([told["motion_tokens"], torch.zeros(2, 3, 12)], dim=1)}
    out = [video(z_t, t, encoder(text, z_ref, fps, **read)) for read in (told, longer)]
    assert torch.allclose(*out, atol=1e-5)


def test_concatenated_tokens_stand_behind_the_text():
    encoder = ConditionEncoder.from_unet2d(
        base(), fusion=None, adapter="concat", image_width=20, num_image_tokens=3
    ).eval()
    _, _, text, z_ref, _ = inputs(1)
    conditions = encoder(text, z_ref, **given())
    assert conditions.image is None and conditions.text.shape == (2, 7 + 3, 24)
    assert torch.equal(conditions.text[:, :7], text)
    assert not torch.equal(conditions.text[0, 7:], conditions.text[1, 7:])


def test_saves_and_loads_with_all_parts(tmp_path):
    video, encoder = nets(base(), fusion="add")
    randomise(video, encoder)
    video.save_pretrained(tmp_path / "unet")
    encoder.save_pretrained(tmp_path / "encoder")
    z_t, t, text, z_ref, fps = inputs(2)
    with torch.no_grad():
        again = VideoUNet.from_pretrained(tmp_path / "unet")(
            z_t, t, ConditionEncoder.from_pretrained(tmp_path / "encoder")(text, z_ref, fps, **given())
        )
        assert torch.equal(video(z_t, t, encoder(text, z_ref, fps, **given())), again)


def test_what_is_added_trains_and_the_base_does_not_change():
    video, encoder = nets(base())
    set_trainable(video, encoder, "temporal")
    randomise(video, encoder)
    z_t, t, text, z_ref, fps = inputs(3)
    video(z_t, t, encoder(text, z_ref, fps, **given())).square().mean().backward()
    for name, parameter in video.named_parameters():
        assert (parameter.grad is not None) == name.startswith(VideoUNet.new_prefixes), name
    assert {"image_gates", "pixel_attentions"} <= {name.split(".")[0] for name in dict(video.named_parameters())}
    assert all(parameter.grad is not None for parameter in encoder.parameters())


# The layers


def test_pixel_attention_finds_the_place_that_looks_alike():
    layer = PixelAwareCrossAttention(8, groups=1).double()
    torch.nn.init.eye_(layer.to_query.weight[:, :, 0, 0])
    torch.nn.init.eye_(layer.to_out.weight[:, :, 0, 0])
    h = torch.randn(2 * 3, 8, 2, 2, dtype=torch.float64)
    query = rearrange(layer.norm(h), "(b f) c h w -> b (f h w) c", b=2)
    # Keys that point where the frames' own features point, far out: each place finds itself and takes the value that stands there.
    value = torch.randn(2, 12, 8, dtype=torch.float64)
    out = layer(h, KeyValue(1e4 * functional.normalize(query, dim=-1), value)) - h
    torch.testing.assert_close(rearrange(out, "(b f) c h w -> b (f h w) c", b=2), value)


def test_attention_is_softmax_of_scaled_products_over_what_is_not_masked():
    query, key, value = (torch.randn(2, n, 6, dtype=torch.float64) for n in (4, 5, 5))
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    found = attention(query, KeyValue(key, value, mask), heads=2)
    for head in (slice(0, 3), slice(3, 6)):
        logits = query[..., head] @ key[..., head].mT / 3**0.5
        weights = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        torch.testing.assert_close(found[..., head], weights @ value[..., head])


def test_motion_attention_reads_every_pixel_alike():
    layer = TemporalTransformer(16, 16, groups=4, max_frames=8, motion_attention=True)
    torch.nn.init.normal_(layer.proj_out.weight)
    h = repeat(torch.randn(2, 16), "b c -> (b f) c h w", f=3, h=2, w=2)
    motion = KeyValue(torch.randn(2, 4, 16), torch.randn(2, 4, 16))
    with torch.no_grad():
        out = layer(h, 3, motion)
        assert not torch.allclose(out, layer(h, 3), atol=1e-3)
        assert torch.allclose(out, out[..., :1, :1].expand_as(out), atol=1e-5)


def test_pyramid_gives_each_layer_the_places_of_its_scale():
    torch.manual_seed(0)
    pyramid = PixelPyramid(downsampling=8, scales=[1, 4], layers=[(4, 6), (1, 10)], width=16)
    found = pyramid(torch.randn(2, 3, 64, 32))
    assert [(x.key.shape, x.value.shape) for x in found] == [((2, 2, 6),) * 2, ((2, 32, 10),) * 2]
    for stage in pyramid.stages:  # without the norms, which carry a trace of each pixel everywhere
        stage[-1] = torch.nn.Identity()
    image = torch.zeros(1, 3, 64, 32)
    changed = image.clone()
    changed[..., 60, 30] = 1
    with torch.no_grad():
        moved = (pyramid(changed)[1].key != pyramid(image)[1].key).any(-1)[0]
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
    ("settings", "words"),
    [
        ({"adapter": "decoupled"}, "needs an image encoder"),
        ({"adapter": "magic", "image_width": 4}, "adapter='magic' is not known"),
        ({"motion_attention": True}, "needs a motion encoder"),
        ({"pixel_scales": (1, 8)}, "pixel_scales has 8"),
        ({"pixel_scales": (2, 1)}, "rising powers of two"),
        ({"adapter": "concat", "image_width": 4, "num_image_tokens": 0}, "must be at least 1"),
    ],
)
def test_parts_that_cannot_work_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        ConditionEncoder.from_unet2d(base(), fusion=None, **settings)


@pytest.mark.parametrize(
    ("part", "missing", "words"),
    [
        ("adapter", "image_tokens", "image tokens"),
        ("pixels", "pixels", "pixels"),
        ("motion", "motion_tokens", "motion"),
    ],
)
def test_what_a_part_reads_must_be_given(part, missing, words):
    _, encoder = nets(base(), (part,))
    _, _, text, z_ref, fps = inputs(1)
    with pytest.raises(UserError, match=words):
        encoder(text, z_ref, fps, **{**given(), missing: None})


def test_conditions_of_another_model_are_refused():
    _, encoder = nets(base())
    plain = VideoUNet.from_unet2d(base())
    z_t, t, text, z_ref, fps = inputs(2)
    with pytest.raises(UserError, match="image_attention"):
        plain(z_t, t, encoder(text, z_ref, fps, **given()))
