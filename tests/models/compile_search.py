"""Compile the kernels of the product-key search, as triton_lookup.py launches them, for a compute
capability given as 80, 90 and so on; print name, warps, registers and spilled bytes of each. Needs
no GPU.

A process of its own, because it tells Triton that there is one.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from memshard.models.kernels import triton_lookup, triton_rows

_launch = JITFunction.run
_DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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
    driver.set_active(_Device())
    triton_rows.device_type = "cpu"  # tensors of the CPU stand in: nothing is run
    JITFunction.run = _compile
    queries, sub_keys = torch.zeros(64, 2, 512), torch.zeros(2, 2, 512, 256)
    # Tensor cores of 7.0 and 7.5 know neither tf32 nor bf16.
    for precision in ("bf16x3", "tf32", "fp32") if int(sys.argv[1]) >= 80 else ("fp32",):
        rows, bits = triton_lookup.look_up(queries, sub_keys, 32, "softmax", precision)
    weights = bits.view(torch.float32)
    triton_lookup.gradients(
        queries, sub_keys, rows, weights, weights, "softmax", wanted=(False, False)
    )
