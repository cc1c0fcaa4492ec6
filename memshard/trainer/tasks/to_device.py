"""Copies from host memory that nothing waits for."""

from functools import cache

import torch
from torch import Tensor


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in host memory on the device, for its current stream.

    To a GPU they go from pinned memory and on a stream of their own: neither the host waits for the
    GPU nor the copy for the update that the GPU still computes.
    """
    if device.type != "cuda":
        return tuple(x.to(device) for x in tensors)
    copying, computing = _stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        # Contiguous: a view would be copied through pageable memory, which waits.
        copies = tuple(x.contiguous().pin_memory().to(device, non_blocking=True) for x in tensors)
    computing.wait_stream(copying)
    for x in copies:
        # Or its memory would be free for the next copy while this stream still reads it.
        x.record_stream(computing)
    return copies


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
