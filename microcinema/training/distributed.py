"""Processes of one run: the accelerator, agreement between ranks, and parameters sharded by FSDP2 or ZeRO-3 (arXiv 1910.02054)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    KwargsHandler,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from microcinema.config.schema import Train
from microcinema.training.launch_settings import check_launch_settings
from microcinema.utils.device import set_precision
from microcinema.utils.errors import UserError, first_line, user_errors

T = TypeVar("T")
_REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(config: Train, *handlers: KwargsHandler) -> Accelerator:
    """The processes, device, precision and tracker of a run. Accelerate keeps one state per process: the first accelerator decides.

    `handlers` are further ones of `Accelerator`. What its environment sets that cannot be or contradicts the run is a UserError.
    """
    set_precision(config.allow_tf32)
    ddp = DistributedDataParallelKwargs(
        bucket_cap_mb=config.ddp.bucket_cap_mb,
        gradient_as_bucket_view=True,  # or gradients would be held twice and copied
        comm_hook=DDPCommunicationHookType(config.ddp.comm_hook or "no"),
    )
    with user_errors("accelerate cannot start ({reason}); check its config and ACCELERATE_*"):
        accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=config.report_to,
            project_config=ProjectConfiguration(config.output_dir, logging_dir=str(Path(config.output_dir) / "logs")),
            # Accelerate would advance the schedule once per process; here a step is a step.
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[ddp, *handlers],
        )
    check_launch_settings(accelerator, config)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        # DeepSpeed clips gradients itself, and would read the batch size from a prepared loader.
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.train_batch_size,
            "gradient_clipping": config.max_grad_norm,
        }
        # By this reference transformers knows of ZeRO-3, and would shard the frozen encoders while it loads them.
        plugin.dschf = None
    return accelerator


def broadcast_from_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Calls the function on the main process alone; returns its result, or raises its UserError, on every rank. Collective."""
    result: list[Any] = [None]
    with raise_on_all_ranks("{reason}", (UserError,)):
        if accelerator.is_main_process:
            result = [function()]
    broadcast_object_list(result)
    return result[0]


@contextmanager
def raise_on_all_ranks(message: str, errors: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Raises a UserError on every rank if any rank failed with one of `errors`, before the next collective. Collective.

    Args:
        message: of the error, with the placeholder `{reason}`.
    """
    reason = None
    try:
        yield
    except errors as error:
        reason = first_line(error)
    reason = next((text for text in gather_object([reason]) if text is not None), None)
    if reason is not None:
        raise UserError(message.replace("{reason}", reason))


def check_replicated(accelerator: Accelerator, setting: str, without: str) -> None:
    """A UserError about a setting, and the one without it, if the parameters are sharded."""
    if (kind := accelerator.distributed_type) not in _REPLICATED:
        raise UserError(f"{setting} works with DistributedDataParallel, not with {kind.value}; set {without}")


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only shards of the parameters."""
    return any(isinstance(parameter, DTensor) or is_zero3(parameter) for parameter in module.parameters())


def prefetch_layers(model: nn.Module) -> None:
    """Lets each layer that FSDP2 shards, if any, while it computes, gather the two that come after it, in forward and in backward.

    Unless it is told, FSDP2 gathers one in backward and none in forward. The order is that of the model's first forward.
    """
    started: list[FSDPModule] = []
    ended: list[FSDPModule] = []
    hooks: list[Any] = []
    for layer in model.modules():
        if isinstance(layer, FSDPModule) and layer is not model:
            hooks.append(layer.register_forward_pre_hook(lambda layer, _: started.append(layer)))
            hooks.append(layer.register_forward_hook(lambda layer, *_: ended.append(layer)))

    def finish(*_: Any) -> None:
        for hook in hooks:
            hook.remove()
        for number, layer in enumerate(started):
            layer.set_modules_to_forward_prefetch(started[number + 1 : number + 3])
        ended.reverse()
        for number, layer in enumerate(ended):
            layer.set_modules_to_backward_prefetch(ended[number + 1 : number + 3])

    if hooks:
        hooks.append(model.register_forward_hook(finish))


def unshard(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, on every rank. Collective if the tensor is sharded; otherwise the tensor itself."""
    if is_zero3(tensor):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The shard of a full tensor, the same on all ranks, that belongs where `like` is: same device, same sharding."""
    if isinstance(like, DTensor):
        # Every rank has the full tensor: nothing has to be sent.
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


def unsharded_shapes(module: nn.Module) -> dict[str, torch.Tensor]:
    """A network's full state as meta tensors, without contents."""
    shapes = {name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in _state(module).items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def unsharded_state(
    module: nn.Module, replacements: Mapping[str, torch.Tensor] | None = None, keep: bool = True
) -> dict[str, torch.Tensor]:
    """A network's state with full tensors, on the CPU; empty on ranks with `keep=False`. Collective.

    Args:
        replacements: tensors, sharded or not, that replace the network's own of the same name.
    """
    state = {}
    for name, tensor in _state(module).items():
        full = unshard((replacements or {}).get(name, tensor))
        if keep:
            state[name] = full.detach().cpu()
    return state


def gathered_copy(component: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """A copy of a diffusers network with this state, on the CPU, in evaluation mode."""
    copy = type(component).from_config(component.config)
    for name, lora in getattr(component, "peft_config", {}).items():
        copy.add_adapter(lora, name)
    copy.load_state_dict(state)
    return copy.eval()


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state with the parameters themselves, whose attributes tell how they are sharded, instead of their data."""
    return {**module.state_dict(), **dict(module.named_parameters())}


def is_zero3(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 shards it."""
    return hasattr(tensor, "ds_id")
