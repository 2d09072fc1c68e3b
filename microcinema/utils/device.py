"""Tensors on their way to a device, and how exactly it computes."""

from typing import Any

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. Waits for nothing that a GPU has still to compute, as a copy from memory that is not pinned would."""
    return (tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor).to(
        device, non_blocking=True
    )


def set_precision(allow_tf32: bool) -> None:
    """Whether GPUs round the factors of float32 products and convolutions to TF32: ten bits, as fp16 has, at several times the speed."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32


def precision_settings() -> dict[str, Any]:
    """What is in force, as JSON: the precision of float32 (`high` is TF32), and the kernels of attention that torch chooses from."""
    kernels = {
        name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
        for name in ("flash", "mem_efficient", "cudnn", "math")
    }
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),  # TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "attention_kernels": [name for name, enabled in kernels.items() if enabled],
    }
