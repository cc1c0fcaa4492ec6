"""Compile every Triton kernel, as triton_rows.py launches it, for a compute capability given as 80,
90 and so on; needs no GPU.

A process of its own, because it tells Triton that there is one.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from memshard.models.kernels import triton_rows
from memshard.models.kernels.plain_rows import AdamUpdate

_launch = JITFunction.run
compiled: set[str] = set()


class _Device:
    """What Triton's compiler asks a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(kernel: JITFunction, *arguments: object, **options: object) -> None:
    result = _launch(kernel, *arguments, **options | {"warmup": True})
    assert result.asm["cubin"], kernel
    compiled.add(kernel.__name__)


driver.set_active(_Device())
triton_rows.device_type = "cpu"  # tensors of the CPU stand in: nothing is run
JITFunction.run = _compile
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for dim, by_row in ((1024, False), (37, True)):
        values, upstream = torch.zeros(6, dim, dtype=dtype), torch.zeros(3, dim)
        rows, weights, offsets = (
            torch.zeros(600, dtype=torch.int32),
            torch.zeros(600),
            torch.tensor([0, 5, 10]),
        )
        triton_rows.gather_sum(values, rows, weights, offsets)
        triton_rows.score_gradients(values, rows, offsets, upstream)
        triton_rows.segment_sums(upstream, rows, weights, torch.tensor([0, 600]))
        factor = torch.ones(1) if by_row else None
        for master in (None, torch.zeros(6, dim)):
            triton_rows.adam_rows(
                AdamUpdate(
                    values=values,
                    exp_avg=torch.zeros(6, dim),
                    exp_avg_sq=torch.zeros(6, dim),
                    master=master,
                    rows=torch.tensor([1]),
                    starts=torch.tensor([0, 600]),
                    bags=rows,
                    weights=weights,
                    upstream=upstream,
                    step_sizes=factor,
                    decay1=factor,
                    decay2=factor,
                    step_size=1e-3,
                    beta1=0.9,
                    beta2=0.98,
                    eps=1e-8,
                    first_row=0,
                    first_column=0,
                    key=-(1 << 62),
                )
            )
print(*sorted(compiled))
