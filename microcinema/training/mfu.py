"""Model FLOP utilization (arXiv 2204.02311, appendix B): operations of a step, and the peak throughput of the device."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_SIDES = {"cpu": 1024, "cuda": 8192}  # of square matrices, large enough to reach the peak throughput
_SECONDS = {"cpu": 0.1, "cuda": 0.5}


class ModelFlops(TorchDispatchMode):
    """Counts the floating-point operations of forward and backward: matrix products, convolutions, attention.

    Computations without gradients, such as frozen encoders, do not count, nor does recomputation by gradient checkpointing: the
    count is the model's, however it is run. Frozen weights have no weight gradient to count.

    Attributes:
        total: operations; one multiply-add is two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        # In backward, gradients are enabled for recomputation only; in forward, for what trains.
        in_backward = torch._C._current_graph_task_id() != -1
        if formula is not None and torch.is_grad_enabled() != in_backward:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product in the run's settings, measured once: an upper bound for a network."""
    return _measure_peak_flops(device, dtype, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _measure_peak_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    side = _SIDES.get(device.type, _SIDES["cuda"])
    a, b = (torch.full((side, side), 0.5, device=device, dtype=dtype) for _ in range(2))
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, total = float("inf"), 0.0
    with torch.no_grad():
        a @ b  # selects a kernel
        synchronize()
        while total < _SECONDS.get(device.type, _SECONDS["cuda"]):
            start = time.perf_counter()
            a @ b
            synchronize()
            seconds = time.perf_counter() - start
            best, total = min(best, seconds), total + seconds
    if device.type == "cuda":
        del a, b
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # so that it is the run's alone
    return 2 * side**3 / best


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
