"""Which path table reads and updates take: the compiled kernels where they are there and right, else plain torch."""

import os
import subprocess
from functools import cache

import torch
from torch import Tensor

from memshard.models.kernels import plain
from memshard.models.kernels.cpu import CpuKernels, build

SWITCH = "MEMSHARD_KERNELS"
_HALF = (torch.float16, torch.bfloat16)


def kernels_for(values: Tensor, sums: Tensor) -> CpuKernels | None:
    """The compiled kernels, if they serve such tensors. sums: weights or gradients."""
    serves = (
        values.device.type == sums.device.type == "cpu"
        and sums.dtype == torch.float32
        and (values.dtype == torch.float32 or values.dtype in _HALF)
        and values.shape[1] > 0
        and len(values) < 2**31
        and not torch.compiler.is_compiling()
    )
    return compiled()[0] if serves else None


@cache
def compiled() -> tuple[CpuKernels | None, str]:
    """The compiled kernels or None, and why. Built and tested against plain torch at the first call."""
    if os.environ.get(SWITCH) == "plain":
        return None, f"{SWITCH}=plain"
    try:
        kernels = build()
    except (OSError, subprocess.SubprocessError) as problem:
        return None, f"no compiled kernels: {problem}"
    for dtype in (torch.float32, *_HALF):
        if not _agrees(kernels, dtype):
            return None, f"compiled kernels disagree with plain torch in {dtype}"
    return kernels, "they agree with plain torch"


@torch.no_grad()
def _agrees(kernels: CpuKernels, dtype: torch.dtype) -> bool:
    """Uneven and empty bags, repeated rows, a dim that fills no vector."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(29, 37, generator=generator).to(dtype)
    rows = torch.randint(29, (50,), generator=generator)
    weights, upstream = torch.randn(50, generator=generator), torch.randn(6, 37, generator=generator)
    offsets = torch.tensor([0, 0, 7, 8, 30, 50])
    pairs = (
        (kernels.gather_sum(values, rows, weights, offsets), plain.gather_sum(values, rows, weights, offsets)),
        (kernels.score_gradients(values, rows, offsets, upstream), plain.score_gradients(values, rows, offsets, upstream)),
        (kernels.sort_reads(rows, 29)[0].long(), torch.sort(rows, stable=True).indices),
    )
    return all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) for ours, theirs in pairs)
