"""The delta rule's scan by a Triton kernel, where there is one and it agrees with plain torch."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from memshard.models.compat import is_traced
from memshard.models.kernels.tested import tested_kernel

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, ...]]
_MOST_FEATURES, _LONGEST_CHUNK = 256, 64


def scan_for(state: Tensor, right: Tensor, plain: Scan) -> Scan:
    """Return what scans such tensors; `plain` is the reference, in torch."""
    fits = right.shape[-1] <= _MOST_FEATURES and right.shape[-2] <= _LONGEST_CHUNK
    if not state.is_cuda or state.dtype != torch.float32 or not fits or is_traced(state):
        return plain
    sizes = right.shape[-1], state.shape[-1], right.shape[-2]
    return _kernel(state.device, plain, sizes) or plain


@cache
def _kernel(device: torch.device, plain: Scan, sizes: tuple[int, int, int]) -> Scan | None:
    """Compile and test the kernel at the first call for a device and sizes, which some GPUs have
    not the room for: 256 features take 160 KB of a multiprocessor.
    """
    return tested_kernel(
        device, "triton_scan:scan", lambda ours: agrees(ours, plain, device, *sizes)
    )


@torch.no_grad()
def agrees(
    scan: Scan, plain: Scan, device: torch.device, features: int, width: int, chunk: int
) -> bool:
    """Return whether both give the same for three chunks, forward and backward."""
    random = torch.Generator().manual_seed(0)
    state = torch.randn(2, 2, features, width, generator=random).to(device)
    added = torch.randn(2, 2, 3, features, width, generator=random).to(device)
    keys = torch.randn(2, 2, 2, 3, chunk, features, generator=random).to(device) / 10
    whole = torch.rand(2, 1, 3, 1, 1, generator=random).to(device)
    for rest in ((None, False), (whole, False), (whole, True)):
        tensors = state, added, keys[0].mT, keys[1]
        pairs = zip(scan(*tensors, *rest), plain(*tensors, *rest), strict=True)
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs):
            return False
    return True
