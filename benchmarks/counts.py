"""Counts what PyTorch is asked to compute: figures that are the same on every machine, at any load."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
_FREE = {*_ALLOCATIONS, "aten::detach", "aten::_unsafe_view", "prim::device"}


class LaunchCounter(TorchDispatchMode):
    """Counts the operations that run within it, forward and backward, and the bytes of the tensors that they read and write.

    An operation of PyTorch's core counts as one launch, whatever number of kernels a device needs for it; views and allocations count
    nothing. An operation in place reads and writes its tensor.

    Attributes:
        launches: number of operations.
        bytes: of all their inputs and outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts it."""
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if not function.is_view and function._schema.name not in _FREE:
            self.launches += 1
            tensors = (leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor))
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out
