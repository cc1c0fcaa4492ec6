"""Copies between a model on a GPU and a table in host memory; on one device nothing is moved."""

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Copy the tensors to host memory together, into pinned memory, and wait once for all."""
    # torch takes pinned memory for such copies. They may be empty until the stream is waited for.
    copies = [x.to("cpu", non_blocking=True) for x in tensors]
    for device in {x.device for x in tensors if x.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from host memory to a device, without waiting for the copy."""
    # torch's allocator keeps the pinned copy until the device has read it, though nobody
    # refers to it.
    return x if x.device == device else x.pin_memory().to(device, non_blocking=True)
