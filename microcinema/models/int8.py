"""Weights in eight bits: frozen linear layers and convolutions that store them as integers, and compute in the precision of their input.

One scale for each output channel (absolute maximum, as in LLM.int8(), arXiv 2208.07339, section 2.1, without its outliers): `w = q scale`,
q from -127 to 127. Libraries quantize linear layers alone, which hold a third of a UNet's weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from microcinema.models.temporal import FrameTaps


class _Product(torch.autograd.Function):
    """The output of a layer, of which the backward pass keeps the integers alone: neither its input nor weights in full precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        autocast = torch.is_autocast_enabled(x.device.type)
        weight = layer.dequantized(torch.get_autocast_dtype(x.device.type) if autocast else x.dtype)
        if isinstance(layer, nn.Linear):
            return functional.linear(x, weight, layer.bias)
        return layer._conv_forward(x, weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        layer, weight = ctx.layer, ctx.layer.dequantized(gradient.dtype)
        if isinstance(layer, nn.Linear):
            return (gradient @ weight).to(ctx.dtype), None
        sizes = layer.stride, layer.padding, layer.dilation, layer.groups
        return conv2d_input(ctx.shape, weight, gradient, *sizes).to(ctx.dtype), None


class _Int8Layer(nn.Module):
    """Base class of layers whose `weight` is int8. Their state is that of the plain layer: what they were made of, or the rounded weights."""

    weight: Tensor
    original: Tensor | None  # in the memory of the CPU
    scale: Tensor

    def quantize(self, keep_original: bool) -> None:
        """Replaces the weights by integers and scales."""
        weight = self.weight.detach()
        self.original = weight.cpu() if keep_original else None
        scale = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True) / 127
        self.register_buffer("scale", scale.clamp(min=torch.finfo(scale.dtype).tiny), persistent=False)
        integers = (
            (weight.float() / self.scale.float()).round().clamp(-127, 127)
        )  # in half precision 127 may become 128
        self.weight = nn.Parameter(integers.to(torch.int8), requires_grad=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The rounded weights."""
        return (self.weight * self.scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """As the plain layer."""
        return _Product.apply(x, self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.dequantized(self.scale.dtype) if self.original is None else self.original
        destination[f"{prefix}weight"] = weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if found := f"{prefix}weight" in state_dict:
            self.weight = nn.Parameter(self.weight.to(self.scale.dtype), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if found:
            self.quantize(self.original is not None)


class Int8Linear(_Int8Layer, nn.Linear):
    """A linear layer with weights in eight bits."""


class Int8Conv2d(_Int8Layer, nn.Conv2d):
    """A convolution with weights in eight bits."""


_CLASSES: dict[type, type] = {nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d, FrameTaps: Int8Conv2d}


def quantize_frozen(network: nn.Module, keep_originals: bool = False) -> list[Any]:
    """Stores in eight bits the weights of a network's linear layers and convolutions of which nothing trains; returns these layers.

    `keep_originals`: the plain weights stay in the memory of the CPU, for the network's state.
    """
    layers: list[Any] = []
    for layer in network.modules():
        if type(layer) in _CLASSES and not any(parameter.requires_grad for parameter in layer.parameters()):
            layer.__class__ = _CLASSES[type(layer)]  # with no parameters of its own
            layers.append(layer)
            layers[-1].quantize(keep_originals)
    return layers
