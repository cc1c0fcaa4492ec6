"""Compile the Triton kernels of the delta rule for a compute capability given as 80, 90 and so on.
Needs no GPU, and a process of its own.
"""

import sys
from typing import Any

import torch

from memshard.models.kernels import triton_delta, triton_scan
from tests.models.without_gpu import compile_only

compiled: list[str] = []


def _keep_name(kernel: Any, result: Any) -> None:
    assert result.asm["cubin"], kernel
    compiled.append(kernel.__name__)


compile_only(sys.argv[1], _keep_name)
for whole in (None, torch.ones(1, 1, 2, 1, 1)):
    for features in (64, 256):
        state, keys = torch.zeros(1, 1, features, 64), torch.zeros(1, 1, 2, 32, features)
        added = torch.zeros(1, 1, 2, features, 64)
        triton_scan.scan(state, added, keys.mT, keys, whole, whole is None)
matrix, square, beta = torch.zeros(1, 32, 64), torch.zeros(1, 32, 32), torch.zeros(1, 32, 1)
state, steps = torch.zeros(1, 64, 64), triton_delta.steps()
steps.solve(matrix, matrix, beta)
steps.read(matrix, matrix, matrix, state)
steps.begin(matrix, matrix, matrix, beta, square, state, matrix)
steps.end(matrix, matrix, beta, square, state, *[matrix] * 4, state)
print(*compiled)
