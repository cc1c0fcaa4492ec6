"""Between a model on a GPU and a table in host memory. Nothing moves where both lie in host
memory.
"""

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors in host memory, copied together into pinned memory and waited for once."""
    copies = [x.to("cpu", non_blocking=True) for x in tensors]
    for device in {x.device for x in tensors if x.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor from host memory on a device, without waiting for the copy."""
    return x if x.device == device else x.pin_memory().to(device, non_blocking=True)
