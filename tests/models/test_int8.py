"""Layers with weights in eight bits: the plain layer with rounded weights, of which a backward pass keeps nothing but the integers."""

import copy

import pytest
import torch
from torch import nn

from microcinema.models.int8 import quantize_frozen

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 5, 5)),
    "convolution of groups, strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 6, 6)),
}


def layer(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make().requires_grad_(False)
    plain.weight[1] = 0  # a channel of zeros has a scale as well
    return plain, copy.deepcopy(plain), torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_plain_one_with_rounded_weights(name):
    plain, stored, x = layer(name)
    assert quantize_frozen(stored) == [stored]
    assert stored.weight.dtype == torch.int8 and stored.weight.abs().amax() == 127
    weight = stored.state_dict()["weight"]
    largest = plain.weight.flatten(1).abs().amax(1)
    assert ((weight - plain.weight).flatten(1).abs().amax(1) <= 1.001 * largest / 254).all()
    assert isinstance(stored, type(plain)) and stored.state_dict().keys() == plain.state_dict().keys()
    plain.weight.copy_(weight)
    saved = []
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        outputs = plain(inputs[0]), stored(inputs[1])
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(out.square().sum(), z)[0] for out, z in zip(outputs, inputs, strict=True)]
    torch.testing.assert_close(*gradients)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        stored(inputs[1])
    assert not saved


@pytest.mark.parametrize("dtype, largest", [(torch.float16, 1 / 254), (torch.bfloat16, 1 / 127)])
def test_weights_in_half_precision_are_rounded_once(dtype, largest):
    torch.manual_seed(0)
    stored = nn.Linear(64, 64, dtype=dtype).requires_grad_(False)
    plain = stored.weight.double()
    quantize_frozen(stored)
    error = (stored.state_dict()["weight"].double() - plain).abs().amax(1) / plain.abs().amax(1)
    assert error.max() < 1.05 * largest


def test_autocast_is_followed_in_both_directions():
    plain, stored, x = layer("convolution")
    quantize_frozen(stored)
    plain.weight.copy_(stored.state_dict()["weight"])
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = plain(inputs[0]), stored(inputs[1])
    assert [out.dtype for out in outputs] == [torch.bfloat16] * 2
    gradients = [torch.autograd.grad(out.sum(), z)[0] for out, z in zip(outputs, inputs, strict=True)]
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)


def test_what_was_stored_can_be_saved_and_replaced():
    plain, stored, x = layer("linear")
    rounded = copy.deepcopy(plain)
    quantize_frozen(stored, keep_originals=True)
    quantize_frozen(rounded)
    assert torch.equal(stored.state_dict()["weight"], plain.weight)
    assert torch.equal(stored(x), rounded(x)) and not torch.equal(stored(x), plain(x))
    other = nn.Linear(6, 5)
    stored.load_state_dict(other.state_dict())
    assert torch.equal(stored.state_dict()["weight"], other.weight) and stored.weight.dtype == torch.int8
    torch.testing.assert_close(stored(x), other(x), rtol=0, atol=0.02)
    before = stored.weight.clone()
    assert stored.load_state_dict({}, strict=False).missing_keys == ["weight", "bias"]
    assert torch.equal(stored.weight, before)


def test_layers_of_which_something_trains_stay_as_they_are():
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)), nn.LayerNorm(2)).requires_grad_(False)
    network[0].weight.requires_grad_(True)
    network[1].bias.requires_grad_(True)
    assert quantize_frozen(network) == [network[2]]
    assert [type(module) for module in network[:2]] == [nn.Linear] * 2


@pytest.mark.parametrize("grad", [False, True])
def test_layers_are_one_graph(grad):
    _, stored, x = layer("convolution of groups, strided")
    network = nn.Sequential(stored, nn.SiLU())
    quantize_frozen(network)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x.requires_grad_(grad)), network(x))
    torch._dynamo.reset()
