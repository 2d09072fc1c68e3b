"""Networks whose parameters FSDP2 (torch's `fully_shard`) or ZeRO-3 (DeepSpeed) has parted over the processes, made whole."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only its parts of the parameters."""
    return any(isinstance(parameter, DTensor) or _of_zero3(parameter) for parameter in module.parameters())


def has_zero3(module: nn.Module) -> bool:
    """Whether it is ZeRO-3 that has parted them."""
    return any(_of_zero3(parameter) for parameter in module.parameters())


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole, in every process; every process must call it. One that is not parted is returned as it is."""
    if _of_zero3(tensor):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_shapes(module: nn.Module) -> dict[str, torch.Tensor]:
    """A network's state as it is when whole, without its contents."""
    return {
        name: torch.empty(getattr(tensor, "ds_shape", tensor.shape), device="meta")
        for name, tensor in _state(module).items()
    }


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
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
    for name, tensor in _state(module).items():
        whole = gather((instead or {}).get(name, tensor))
        if keep:
            state[name] = whole.detach().cpu()
    return state


def gathered_copy(component: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """Another of a diffusers network, on the CPU, in evaluation, with this state."""
    copy = type(component).from_config(component.config)
    copy.load_state_dict(state)
    return copy.eval()


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Its state with the parameters themselves, whose attributes say how they are parted, in the place of their contents."""
    return {**module.state_dict(), **dict(module.named_parameters())}


def _of_zero3(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")
