import pytest
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from microcinema.models.attention import KeyValue, attention, zero_init
from microcinema.models.temporal import FrameConv, TemporalConv, TemporalTransformer, sinusoids

KINDS = ("conv", "conv over frames", "transformer")


def randomise(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def make(kind, channels=16):
    if kind == "transformer":
        return transformer(channels, channels // 2)
    return {"conv": TemporalConv(channels, 4, False), "conv over frames": TemporalConv(channels, 4, True)}[kind]


def transformer(channels=16, width=16, max_frames=8, text_width=None):
    return TemporalTransformer(channels, width, 4, max_frames, text_width, feed_forward=2)


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_is_exactly_the_identity_at_initialisation(kind, frames):
    h = torch.randn(3 * frames, 16, 4, 6)
    assert torch.equal(make(kind)(h, frames), h)


@pytest.mark.parametrize("kind", KINDS)
def test_clips_and_pixels_are_independent_and_frames_are_not(kind):
    layer = randomise(make(kind)).double()
    h = torch.randn(2 * 5, 16, 4, 4, dtype=torch.float64)
    changed = rearrange(h.clone(), "(b f) c h w -> b f c h w", b=2)
    # A change that the norm over a frame's pixels does not pass on to other pixels: two pixels swapped.
    changed[0, 2, :, [0, 1], 0] = changed[0, 2, :, [1, 0], 0]
    moved = layer(rearrange(changed, "b f c h w -> (b f) c h w"), 5) - layer(h, 5)
    moved = rearrange(moved, "(b f) c h w -> b f c h w", b=2).abs().amax(dim=2) > 1e-9
    assert not moved[1].any()
    assert not moved[0, :, 2:].any()
    assert not moved[0, :, :, 1:].any()
    reached = moved[0, :, 0, 0]
    assert reached.tolist() == ([True] * 5 if kind == "transformer" else [False, True, True, True, False])


@pytest.mark.parametrize("over_frames", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 6])
def test_temporal_conv_is_a_convolution_over_frames(frames, over_frames):
    layer = randomise(TemporalConv(8, 2, over_frames)).double()
    h = torch.randn(2 * frames, 8, 3, 3, dtype=torch.float64)
    clips = rearrange(h, "(b f) c h w -> b c f h w", b=2)
    normed = layer.norm(clips) if over_frames else rearrange(layer.norm(h), "(b f) c h w -> b c f h w", b=2)
    x = functional.silu(normed)
    to_next, to_self, to_previous = layer.taps.weight.chunk(3)
    weight = torch.stack([to_next, to_self, to_previous], dim=2).squeeze(-1)[..., None, None]
    expected = functional.conv3d(x, weight.reshape(8, 8, 3, 1, 1), padding=(1, 0, 0))
    torch.testing.assert_close(layer(h, frames), h + rearrange(expected, "b c f h w -> (b f) c h w"))


@torch.no_grad()
def test_norm_over_frames_has_the_statistics_of_the_clip():
    """With all frames alike a permuted clip is the same; else the statistics of a clip do not depend on the order of its frames."""
    layer = TemporalConv(8, 2, over_frames=True).double()
    torch.nn.init.normal_(layer.taps.weight[8:16])  # the product of a frame with itself alone
    h = torch.randn(5, 8, 3, 3, dtype=torch.float64) * torch.arange(1.0, 6)[:, None, None, None]
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(layer(h[order], 5), layer(h, 5)[order])
    one_by_one = torch.cat([layer(frame[None], 1) for frame in h])
    assert (one_by_one - layer(h, 5)).abs().max() > 0.1
    groups = rearrange(h, "f (g c) h w -> g (f c h w)", g=2)
    mean, var = groups.mean(1).repeat_interleave(4), groups.var(1, unbiased=False).repeat_interleave(4)
    x = (h - mean[:, None, None]) / (var + layer.norm.eps).sqrt()[:, None, None]
    expected = h + functional.conv2d(functional.silu(x), layer.taps.weight[8:16])
    torch.testing.assert_close(layer(h, 5), expected)


@pytest.mark.parametrize("frames", [1, 4])
def test_frame_conv_is_a_plain_convolution_over_frames_with_its_derivatives(frames):
    layer = randomise(FrameConv(6)).double()
    h = torch.randn(2 * frames, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    to_next, to_self, to_previous = layer.taps.weight.chunk(3)
    weight = torch.stack([to_next, to_self, to_previous], dim=2).reshape(6, 6, 3, 1, 1)
    expected = functional.conv3d(rearrange(h, "(b f) c h w -> b c f h w", b=2), weight, padding=(1, 0, 0))
    expected = h + rearrange(expected, "b c f h w -> (b f) c h w")
    out, places = layer(h, frames), (h, layer.taps.weight)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for found, wanted in zip(*(torch.autograd.grad(y, places, upstream) for y in (out, expected)), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_frame_conv_whose_taps_are_of_another_kind_is_the_same():
    """As with LoRA or weights in eight bits: the products of every frame are computed, and shifted."""
    layer = randomise(FrameConv(6)).double()
    h, x = (torch.randn(8, 6, 3, 3, dtype=torch.float64) for _ in range(2))
    expected = layer(h, 4, x), layer(h, 4), layer(h, 1)
    layer.taps.__class__ = nn.Conv2d
    torch.testing.assert_close((layer(h, 4, x), layer(h, 4), layer(h, 1)), expected)


def test_the_derivatives_of_frame_conv_have_the_dtypes_of_their_tensors_under_autocast():
    layer = randomise(FrameConv(6))
    h = torch.randn(4, 6, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(h, 4)
    wanted = torch.autograd.grad(layer(h, 4).square().sum(), (h, layer.taps.weight))
    found = torch.autograd.grad(out.square().sum(), (h, layer.taps.weight))
    assert out.dtype == torch.float32
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_temporal_transformer_knows_the_order_of_the_frames():
    layer = randomise(transformer(width=8)).double()
    h = torch.randn(4, 16, 2, 2, dtype=torch.float64)
    assert (layer(h.flip(0), 4).flip(0) - layer(h, 4)).abs().max() > 1e-3
    nn.init.zeros_(layer.positions)
    torch.testing.assert_close(layer(h.flip(0), 4).flip(0), layer(h, 4))
    without = randomise(transformer(width=8, max_frames=None)).double()
    torch.testing.assert_close(without(h.flip(0), 4).flip(0), without(h, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_does_not_matter(kind):
    layer = randomise(make(kind)).double()
    h = torch.randn(6, 16, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(h.contiguous(memory_format=torch.channels_last), 3), layer(h, 3))


@pytest.mark.parametrize("width", [4, 40, 80, 160, 320])
def test_heads_divide_the_width(width):
    layer = transformer(width, width, max_frames=2)
    assert width % layer.heads == 0
    assert layer.heads == 1 or width // layer.heads >= 32


def test_sinusoids():
    table = sinusoids(10, 7)
    assert table.shape == (10, 7)
    assert torch.equal(table[0], torch.tensor([0.0] * 4 + [1.0] * 3))
    torch.testing.assert_close(table[:, 0], torch.arange(10.0).sin())


def test_zero_init():
    layer = zero_init(nn.Conv2d(2, 3, 1))
    assert not any(parameter.any() for parameter in layer.parameters())


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_more_sequences_than_a_grid_of_cuda_holds_is_that_of_each(masked, monkeypatch):
    """64 clips of 256x256 have 65,536 positions."""
    batches, sdpa = [], functional.scaled_dot_product_attention

    def counted(query, key, value, attn_mask):
        batches.append(len(query))
        return sdpa(query, key, value, attn_mask)

    q, k, v = torch.randn(3, 2**16 + 5, 3, 4)
    mask = torch.arange(3) < torch.randint(1, 4, (len(q), 1)) if masked else None
    expected = sdpa(q, k, v, None if mask is None else mask[:, None])
    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(attention(q, KeyValue(k, v, mask), heads=1), expected)
    assert batches == [65_535, 6]
