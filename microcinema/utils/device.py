"""Tensors on their way to a device."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. Waits for nothing that a GPU has still to compute, as a copy from memory that is not pinned would."""
    return (tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor).to(
        device, non_blocking=True
    )
