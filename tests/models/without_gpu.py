"""Compile Triton's kernels for a GPU that is not there. A process that does has to do nothing else,
because it tells Triton that there is one.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def compiled(script: str, capability: str, cache: Path) -> str:
    """Return what a script of tests/models prints that compiles for a compute capability, given as
    80, 90 and so on. AssertionError with its traceback.
    """
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, f"tests/models/{script}", capability]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def passed_in_interpreter(file: str, tests: str) -> str:
    """Run those tests of a file whose names have a word in Triton's interpreter; return what pytest
    says. AssertionError with it if one fails.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def compile_only(capability: str, see: Callable[[Any, Any], None]) -> None:
    """Let every launch of a kernel compile it instead, and call see(kernel, result). Tensors of the
    CPU stand in for the GPU's.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from memshard.models.kernels import triton_rows

    class Device:
        """What Triton's compiler asks a driver."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", int(capability), 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    launch = JITFunction.run

    def compile_kernel(kernel: Any, *arguments: object, **options: object) -> None:
        see(kernel, launch(kernel, *arguments, **options | {"warmup": True}))

    driver.set_active(Device())
    triton_rows.device_type = "cpu"
    JITFunction.run = compile_kernel
