"""Compile dropout's Triton kernel for a compute capability given as 80, 90 and so on. Needs no GPU,
and a process of its own.
"""

import sys
from typing import Any

import torch

from memshard.models.kernels import triton_dropout
from tests.models.without_gpu import compile_only

compiled: list[str] = []


def _keep_name(kernel: Any, result: Any) -> None:
    assert result.asm["cubin"], kernel
    compiled.append(kernel.__name__)


compile_only(sys.argv[1], _keep_name)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    x = torch.zeros(2, 3, 16, dtype=dtype)
    triton_dropout.dropped(x, 0.1, -(1 << 62), torch.arange(2), torch.arange(3).expand(2, -1))
print(*compiled)
