"""The Triton kernels pass the tests of the compiled ones: on a GPU, or by Triton's interpreter on
small CPU tensors.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton: pip install --no-deps triton==3.7.1",
)


def _run(**environment: str) -> None:
    """Triton decides when it is imported whether to compile or to interpret, hence a process of its
    own.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/parity/test_kernels.py",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    # Skipped tests say that plain torch runs, and why.
    assert "passed" in done.stdout and "plain torch" not in done.stdout, done.stdout


@needs_triton
def test_in_the_interpreter() -> None:
    _run(TRITON_INTERPRET="1", KERNELS_ON="cpu")


@needs_triton
@pytest.mark.parametrize("capability", ["80", pytest.param("90", marks=pytest.mark.slow)])
def test_they_compile_without_a_gpu(capability: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "tests/parity/compile_triton.py", capability]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.split() == ["adam_rows", "gather_sum", "score_gradients", "segment_sums"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    _run(TRITON_INTERPRET="0", KERNELS_ON="cuda")
