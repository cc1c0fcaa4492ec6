"""Dropout by a Triton kernel, where there is one and it draws what plain torch does."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from memshard.models.compat import is_traced
from memshard.models.kernels.tested import tested_kernel

Dropout = Callable[[Tensor, float, Any, Tensor, Tensor], Tensor]


def dropout_for(x: Tensor, plain: Dropout) -> Dropout:
    """Return what drops elements of such tensors; `plain` is the reference, in torch."""
    if not x.is_cuda or x.dtype == torch.float64 or is_traced(x):
        return plain
    return _kernel(x.device, x.dtype, plain) or plain


@cache
def _kernel(device: torch.device, dtype: torch.dtype, plain: Dropout) -> Dropout | None:
    """Compile and test the kernel at a device's first call."""
    return tested_kernel(
        device, "triton_dropout:dropout", lambda ours: agrees(ours, plain, device, dtype)
    )


@torch.no_grad()
def agrees(dropout: Dropout, plain: Dropout, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether both draw the same mask and give the same values, but for rounding."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 37, generator=random).to(device, dtype)
    samples = torch.tensor([0, -1, 1 << 40], device=device)
    positions = torch.arange(5, device=device) + torch.tensor([[0], [1 << 33], [9]], device=device)
    ours, theirs = (drop(x, 0.3, -(1 << 62) + 5, samples, positions) for drop in (dropout, plain))
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    return torch.equal(ours == 0, theirs == 0) and torch.allclose(ours, theirs, tolerance)
