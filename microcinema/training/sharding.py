"""Networks whose parameters FSDP2 (torch's `fully_shard`) has parted over the processes, made whole."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only its parts of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole, in every process; every process must call it. One that is not parted is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor, the same in all processes, what belongs where `like` is: on its device, parted as it is."""
    if isinstance(like, DTensor):
        # Every process has the whole: there is nothing to be sent.
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


def gather_state(
    module: nn.Module, instead: Mapping[str, torch.Tensor] | None = None, keep: bool = True
) -> dict[str, torch.Tensor]:
    """A network's state with whole tensors, on the CPU; every process must call it.

    Args:
        instead: tensors, parted or not, to take in the place of its own, by their names.
        keep: whether this process wants it; one that does not takes part in the gathering, and gets nothing.
    """
    state = {}
    for name, tensor in module.state_dict().items():
        whole = gather((instead or {}).get(name, tensor))
        if keep:
            state[name] = whole.detach().cpu()
    return state


def whole_copy(component: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """Another of a diffusers network, on the CPU, in evaluation, with this state."""
    copy = type(component).from_config(component.config)
    copy.load_state_dict(state)
    return copy.eval()
