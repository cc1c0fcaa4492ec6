"""Compile the kernels of the product-key search, as triton_lookup.py launches them, for a compute
capability given as 80, 90 and so on; print name, warps, registers and spilled bytes of each. Needs
no GPU, and a process of its own.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton

from memshard.models.kernels import triton_lookup
from tests.models.without_gpu import compile_only

_DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _print_usage(kernel: Any, result: Any) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [str(_DUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert numbers, usage
    registers, stack, local = map(int, numbers.groups())
    print(kernel.__name__, result.metadata.num_warps, registers, stack + local)


if __name__ == "__main__":
    compile_only(sys.argv[1], _print_usage)
    queries, sub_keys = torch.zeros(64, 2, 512), torch.zeros(2, 2, 512, 256)
    # 2^15 sub-keys, which 16 bits do not number.
    many = torch.zeros(1, 16, 4), torch.zeros(16, 2, 1024, 2)
    # Tensor cores of 7.0 and 7.5 know neither tf32 nor bf16.
    for precision in ("bf16x3", "tf32", "fp32") if int(sys.argv[1]) >= 80 else ("fp32",):
        triton_lookup.look_up(queries, sub_keys, 32, "softmax", precision)
    for x, keys in (queries, sub_keys), many:
        rows = torch.zeros(*x.shape[:2], 32, dtype=torch.int32)
        weights = rows.float()
        triton_lookup.gradients(x, keys, rows, weights, weights, "softmax", wanted=(False, False))
