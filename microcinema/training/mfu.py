"""Model FLOP utilisation (arXiv 2204.02311, appendix B): the operations that a step takes, and those that the device can do at most."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_SIDES = {"cpu": 1024, "cuda": 8192}  # of square matrices, large enough for a device to reach what it can
_SECONDS = {"cpu": 0.1, "cuda": 0.5}


class ModelFlops(TorchDispatchMode):
    """Within it the floating-point operations of forward and backward are counted: matrix products, convolutions, attention.

    What is computed without gradients, such as frozen encoders, does not count, nor does what gradient checkpointing computes once
    more: the figure is that of the model, however it is run. A frozen weight has no gradient to compute, and counts so.

    Attributes:
        total: operations, a multiplication and an addition being two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _formula(func._overloadpacket)
        # In backward gradients are on for what is computed once more alone, in forward for what is learned from.
        in_backward = torch._C._current_graph_task_id() != -1
        if formula is not None and torch.is_grad_enabled() != in_backward:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the largest matrix product that is worth trying, measured once in a process: the most that a network may hope for.

    In the settings of the run, such as TF32, on as many threads as it has.
    """
    return _measured(device, dtype, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    side = _SIDES.get(device.type, _SIDES["cuda"])
    a, b = (torch.full((side, side), 0.5, device=device, dtype=dtype) for _ in range(2))
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, spent = float("inf"), 0.0
    with torch.no_grad():
        a @ b  # chooses a kernel
        wait()
        while spent < _SECONDS.get(device.type, _SECONDS["cuda"]):
            began = time.perf_counter()
            a @ b
            wait()
            taken = time.perf_counter() - began
            best, spent = min(best, taken), spent + taken
    if device.type == "cuda":
        del a, b
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # that of the run is to be its own
    return 2 * side**3 / best


@functools.cache
def _formula(packet: Any) -> Callable[..., int] | None:
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return _cpu_attention
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return _cpu_attention_backward
    return flop_registry.get(packet)


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)
