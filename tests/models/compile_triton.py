"""Compile every Triton kernel, as triton_rows.py launches it, for a compute capability given as 80,
90 and so on. Needs no GPU, and a process of its own.
"""

import sys
from typing import Any

import torch

from memshard.models.kernels import triton_rows
from memshard.models.kernels.plain_rows import AdamUpdate
from tests.models.without_gpu import compile_only

compiled: set[str] = set()


def _keep_name(kernel: Any, result: Any) -> None:
    assert result.asm["cubin"], kernel
    compiled.add(kernel.__name__)


compile_only(sys.argv[1], _keep_name)
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
        triton_rows.score_gradients(values, rows, offsets, upstream.bfloat16())
        triton_rows.segment_sums(upstream, rows, weights, torch.tensor([0, 600]))
        # As the search numbers sub-keys.
        triton_rows.gather_sum(values, rows.short(), weights, offsets)
        factor = torch.ones(1) if by_row else None
        for master, of in (None, torch.float32), (torch.zeros(6, dim), torch.bfloat16):
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
                    upstream=upstream.to(of),
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
