"""The written-out I3D: the names and shapes of the public files, and the arithmetic of its padding."""

import pytest
import torch

from microcinema.evaluation.i3d import I3D, Unit3d, max_pool, pad_same
from microcinema.utils.errors import UserError

WIDTHS = {  # in -> b0, b1a, b1b, b2a, b2b, b3b
    "3b": (192, [64, 96, 128, 16, 32, 32]),
    "3c": (256, [128, 128, 192, 32, 96, 64]),
    "4b": (480, [192, 96, 208, 16, 48, 64]),
    "4c": (512, [160, 112, 224, 24, 64, 64]),
    "4d": (512, [128, 128, 256, 24, 64, 64]),
    "4e": (512, [112, 144, 288, 32, 64, 64]),
    "4f": (528, [256, 160, 320, 32, 128, 128]),
    "5b": (832, [256, 160, 320, 32, 128, 128]),
    "5c": (832, [384, 192, 384, 48, 128, 128]),
}


def listed() -> dict[str, tuple[int, ...]]:
    """Every parameter and buffer of the public files."""
    units = {"Conv3d_1a_7x7": (3, 64, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (64, 192, 3)}
    for name, (width, (b0, b1a, b1b, b2a, b2b, b3b)) in WIDTHS.items():
        branches = {"b0": (width, b0, 1), "b1a": (width, b1a, 1), "b1b": (b1a, b1b, 3)}
        branches |= {"b2a": (width, b2a, 1), "b2b": (b2a, b2b, 3), "b3b": (width, b3b, 1)}
        units |= {f"Mixed_{name}.{branch}": shape for branch, shape in branches.items()}
    shapes: dict[str, tuple[int, ...]] = {"logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}
    for name, (width, out, kernel) in units.items():
        shapes[f"{name}.conv3d.weight"] = (out, width, kernel, kernel, kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (out,)
        shapes[f"{name}.bn.num_batches_tracked"] = ()
    return shapes


def test_names_and_shapes_are_those_of_the_public_files():
    assert {name: tuple(value.shape) for name, value in I3D().state_dict().items()} == listed()


def test_a_file_without_counts_of_batches_is_read_and_anything_else_missing_is_named():
    state = I3D().state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    network = I3D.from_state_dict(old, eps=1e-5)
    assert not network.training and network.Mixed_3b.b0.bn.eps == 1e-5
    with pytest.raises(UserError, match=r"1 missing \(Mixed_3b.b0.conv3d.weight\), 1 unknown \(head\)"):
        I3D.from_state_dict(
            {**{k: v for k, v in old.items() if k != "Mixed_3b.b0.conv3d.weight"}, "head": torch.zeros(1)}
        )
    with pytest.raises(UserError, match=r"logits.conv3d.bias: .*\[3\]"):
        I3D.from_state_dict({**old, "logits.conv3d.bias": torch.zeros(3)})
    charades = {"logits.conv3d.weight": torch.zeros(157, 1024, 1, 1, 1), "logits.conv3d.bias": torch.zeros(157)}
    with pytest.raises(UserError, match=r"logits.conv3d.bias: .*\[157\]"):
        I3D.from_state_dict(old | charades)


@pytest.mark.parametrize("size, kernel, stride, front, back", [(224, 7, 2, 2, 3), (7, 3, 2, 1, 1), (8, 3, 2, 0, 1)])
def test_padding_is_that_of_tensorflow(size, kernel, stride, front, back):
    x = torch.ones(1, 1, 1, 1, size)
    padded = pad_same(x, (1, 1, kernel), (1, 1, stride))[0, 0, 0, 0]
    assert padded[:front].sum() == 0 and padded[len(padded) - back :].sum() == 0
    assert len(padded) == size + front + back and padded.sum() == size
    assert (len(padded) - kernel) // stride + 1 == -(-size // stride)


def test_a_unit_at_stride_one_pads_as_same_does():
    unit = Unit3d(1, 1, 3, 1, 1e-3, bare=True)
    x = torch.randn(1, 1, 4, 5, 6)
    expected = torch.nn.functional.conv3d(pad_same(x, (3,) * 3, (1,) * 3), unit.conv3d.weight, unit.conv3d.bias)
    torch.testing.assert_close(unit(x), expected)


@pytest.mark.parametrize("shape", [(1, 3, 9, 224, 224), (1, 3, 16, 224, 200)])
def test_clips_that_it_cannot_read_are_refused(shape):
    with pytest.raises(UserError, match=f"{shape[2]} frames of 224x{shape[4]}"):
        I3D().eval()(torch.zeros(shape))


@pytest.mark.parametrize(
    "kernel, stride", [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))]
)
@pytest.mark.parametrize("shape", [(2, 3, 8, 28, 28), (1, 2, 5, 7, 9)])
def test_pooling_one_axis_after_the_other_is_pooling(kernel, stride, shape):
    x = torch.relu(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    expected = torch.nn.functional.max_pool3d(pad_same(x, kernel, stride), kernel, stride)
    assert torch.equal(max_pool(x, kernel, stride), expected)
