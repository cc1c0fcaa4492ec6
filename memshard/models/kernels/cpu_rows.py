"""Compiled CPU kernels: built with the machine's own compiler at first use, kept in the user's
cache, called through ctypes.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("rows.cpp")
# Without trapping or errno, sqrt and floor vectorise; sums keep their order, so results do not
# depend on the compiler's mood.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
)
_BUILD_SECONDS = 120
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "memshard_gather_sum": [
        _POINTER,
        _INT,
        _SIZE,
        _SIZE,
        _POINTER,
        _POINTER,
        _POINTER,
        _SIZE,
        _SIZE,
        _POINTER,
        _INT,
    ],
    "memshard_score_gradients": [
        _POINTER,
        _INT,
        _SIZE,
        _POINTER,
        _POINTER,
        _SIZE,
        _SIZE,
        _POINTER,
        _POINTER,
        _INT,
    ],
    "memshard_sort_reads": [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER],
    "memshard_adam_rows": [_POINTER],
}


class _Update(ctypes.Structure):
    """The arguments of memshard_adam_rows, as rows.cpp lays them out."""

    _fields_ = [
        *(
            (name, _POINTER)
            for name in (
                "values",
                "exp_avg",
                "exp_avg_sq",
                "master",
                "rows",
                "starts",
                "bags",
                "weights",
                "upstream",
            )
        ),
        *((name, _POINTER) for name in ("step_sizes", "decay1", "decay2")),
        *((name, _SIZE) for name in ("count", "dim", "first_row", "first_column", "key")),
        *((name, ctypes.c_float) for name in ("beta1", "beta2", "eps", "step_size")),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class CpuKernels:
    """The loaded library. Tensors must lie in CPU memory; sums, weights and gradients are fp32,
    values fp32, fp16 or bf16.
    """

    library: ctypes.CDLL

    def gather_sum(self, values: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """As `bags.gather_sum`. IndexError if a row is not in the table."""
        values, rows, weights, offsets = (
            values.contiguous(),
            _int32(rows),
            weights.contiguous(),
            offsets.contiguous(),
        )
        out = torch.empty(len(offsets), values.shape[1])
        outside = self.library.memshard_gather_sum(
            values.data_ptr(),
            _DTYPES[values.dtype],
            *values.shape,
            rows.data_ptr(),
            weights.data_ptr(),
            offsets.data_ptr(),
            len(offsets),
            len(rows),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if outside:
            raise IndexError(f"a row number is outside the table's {len(values)} rows")
        return out

    def score_gradients(
        self, values: Tensor, rows: Tensor, offsets: Tensor, upstream: Tensor
    ) -> Tensor:
        """As `bags.score_gradients`; the rows have been summed before, so they are in the table."""
        values, rows, upstream, offsets = (
            values.contiguous(),
            _int32(rows),
            upstream.contiguous(),
            offsets.contiguous(),
        )
        out = torch.empty(len(rows))
        self.library.memshard_score_gradients(
            values.data_ptr(),
            _DTYPES[values.dtype],
            values.shape[1],
            rows.data_ptr(),
            offsets.data_ptr(),
            len(offsets),
            len(rows),
            upstream.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def segment_sums(self, values: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
        """As `bags.segment_sums`."""
        span = slice(int(starts[0]), int(starts[-1]))
        return self.gather_sum(values, rows[span], weights[span], starts[:-1] - starts[0])

    def sort_reads(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `plain.sort_reads`; the order is int32."""
        rows, slots = _int32(rows), int(rows.max()) + 1 if len(rows) else 0
        order, distinct = (
            torch.empty(len(rows), dtype=torch.int32),
            torch.empty(len(rows), dtype=torch.int64),
        )
        starts = torch.empty(len(rows) + 1, dtype=torch.int64)
        pointers = (
            rows.data_ptr(),
            len(rows),
            slots,
            order.data_ptr(),
            distinct.data_ptr(),
            starts.data_ptr(),
        )
        count = self.library.memshard_sort_reads(*pointers)
        return order, distinct[:count], starts[: count + 1]

    def adam_rows(self, tensors: dict[str, Tensor | None], numbers: dict[str, float]) -> None:
        """Sum each row's gradient and update it in one pass. tensors, numbers: the fields of
        `_Update`.
        """
        values = tensors["values"]
        assert values is not None
        update = _Update(
            dtype=_DTYPES[values.dtype],
            threads=torch.get_num_threads(),
            dim=values.shape[1],
            **numbers,
        )
        for name, tensor in tensors.items():
            assert tensor is None or tensor.is_contiguous(), name
            setattr(update, name, None if tensor is None else tensor.data_ptr())
        self.library.memshard_adam_rows(ctypes.byref(update))


@cache
def build() -> CpuKernels:
    """The table kernels; raises as `load`."""
    library = load(_SOURCE)
    library.memshard_sort_reads.restype = _SIZE
    for name, types in _ARGUMENTS.items():
        getattr(library, name).argtypes = types
    return CpuKernels(library)


def load(source: Path) -> ctypes.CDLL:
    """Compile, unless that is done, and load. OSError or subprocess.SubprocessError with the
    compiler's words if it cannot be.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler: install g++, or set CXX")
    path = _cache() / f"{source.stem}-{_key(source, compiler)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, *_FLAGS, "-shared", "-fPIC", str(source), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS)
            if done.returncode:
                raise OSError(
                    f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}"
                )
            os.replace(built, path)  # ranks may build at the same time
    # torch has loaded its own libgomp.so.1, which this library then shares: two pools of threads
    # would spin against each other.
    return ctypes.CDLL(str(path))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memshard"


def _key(source: Path, compiler: str) -> str:
    """Of source, flags, compiler and processor: a home folder may be shared by different
    machines.
    """
    version = subprocess.run(
        [compiler, "-dumpfullversion", "-dumpversion"],
        capture_output=True,
        text=True,
        timeout=_BUILD_SECONDS,
    ).stdout
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        facts = ("model name", "flags", "Features")
        processor += "".join(
            sorted({line for line in info.read_text().splitlines() if line.startswith(facts)})
        )
    return hashlib.sha256(
        "\0".join((source.read_text(), *_FLAGS, compiler, version, processor)).encode()
    ).hexdigest()[:16]


def _int32(rows: Tensor) -> Tensor:
    return rows.to(torch.int32).contiguous()
