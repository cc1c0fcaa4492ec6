"""The row backend of CPUs: rows.cpp, called through ctypes."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memshard.models.compat import is_traced
from memshard.models.kernels import plain_rows
from memshard.models.kernels.compile_cpp import load_library
from memshard.models.kernels.plain_rows import AdamUpdate

_SOURCE = Path(__file__).with_name("rows.cpp")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# fmt: off
_ARGUMENTS = {  # in the order of rows.cpp
    "memshard_gather_sum": [
        _POINTER, _INT, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _INT,
    ],
    "memshard_score_gradients": [
        _POINTER, _INT, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _INT,
    ],
    "memshard_sort_reads": [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER],
    "memshard_adam_rows": [_POINTER],
}
_STORED = ("values", "exp_avg", "exp_avg_sq", "master")
_READS = ("rows", "starts", "bags", "weights", "upstream")
_BY_ROW = ("step_sizes", "decay1", "decay2")
# fmt: on


class _Update(ctypes.Structure):
    """The struct Update of rows.cpp: the fields of `AdamUpdate`, and what C++ cannot ask."""

    _fields_ = [
        *((name, _POINTER) for name in (*_STORED, *_READS, *_BY_ROW)),
        *((name, _SIZE) for name in ("count", "dim", "first_row", "first_column", "key")),
        *((name, ctypes.c_float) for name in ("beta1", "beta2", "eps", "step_size")),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class CpuRows:
    """The `RowBackend` of the loaded library; what it does not serve goes to plain torch."""

    library: ctypes.CDLL

    def gather_sum(self, values: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """Do what `plain_rows.gather_sum` does. IndexError if a row is not in the table."""
        if plain_rows.needed_for(values, weights, "cpu"):
            return plain_rows.gather_sum(values, rows, weights, offsets)
        values, rows = values.contiguous(), _int32(rows)
        weights, offsets = weights.contiguous(), offsets.contiguous()
        out = weights.new_empty(len(offsets), values.shape[1])
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
        # The kernel checks as it reads, and skips such rows instead of reading foreign memory.
        if outside:
            raise IndexError(f"a row number is outside the table's {len(values)} rows")
        return out

    def score_gradients(
        self, values: Tensor, rows: Tensor, offsets: Tensor, upstream: Tensor
    ) -> Tensor:
        """Do what `plain_rows.score_gradients` does; `gather_sum` has checked the row numbers."""
        if plain_rows.needed_for(values, upstream, "cpu"):
            return plain_rows.score_gradients(values, rows, offsets, upstream)
        values, rows = values.contiguous(), _int32(rows)
        upstream, offsets = upstream.contiguous(), offsets.contiguous()
        out = upstream.new_empty(len(rows))
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
        """Do what `plain_rows.segment_sums` does."""
        # A segment is a bag of consecutive reads, so the same kernel sums both.
        span = slice(int(starts[0]), int(starts[-1]))
        return self.gather_sum(values, rows[span], weights[span], starts[:-1] - starts[0])

    def sort_reads(self, rows: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `plain_rows.sort_reads` does; the order is int32."""
        # The kernel is a stable radix sort of 32-bit row numbers.
        if rows.dtype != torch.int32 or not rows.is_cpu or is_traced(rows):
            return plain_rows.sort_reads(rows, slots)
        # Fewer than there are, maybe, which saves passes.
        rows, slots = rows.contiguous(), int(rows.max()) + 1 if len(rows) else 0
        order = torch.empty_like(rows)
        distinct = torch.empty_like(rows, dtype=torch.int64)
        starts = rows.new_empty(len(rows) + 1, dtype=torch.int64)
        count = self.library.memshard_sort_reads(
            rows.data_ptr(),
            len(rows),
            slots,
            order.data_ptr(),
            distinct.data_ptr(),
            starts.data_ptr(),
        )
        return order, distinct[:count], starts[: count + 1]

    def adam_rows(self, update: AdamUpdate) -> None:
        """Do what `plain_rows.adam_rows` does, in one pass: a row is updated while its gradient
        is cached.
        """
        narrow = update.upstream.dtype != torch.float32
        if narrow or plain_rows.needed_for_update(update, "cpu"):
            return plain_rows.adam_rows(update)
        tensors = {name: getattr(update, name) for name in _STORED}
        # Named until the call is over: a temporary's memory could be given away before.
        reads = {name: getattr(update, name) for name in (*_READS, *_BY_ROW)}
        reads = {name: None if x is None else x.contiguous() for name, x in reads.items()}
        reads["bags"] = _int32(reads["bags"])
        arguments = _Update(
            dtype=_DTYPES[update.values.dtype],
            threads=torch.get_num_threads(),
            count=len(update.rows),
            dim=update.values.shape[1],
            first_row=update.first_row,
            first_column=update.first_column,
            key=update.key,
            beta1=update.beta1,
            beta2=update.beta2,
            eps=update.eps,
            step_size=update.step_size,
        )
        for name, tensor in (tensors | reads).items():
            assert tensor is None or tensor.is_contiguous(), name
            setattr(arguments, name, None if tensor is None else tensor.data_ptr())
        self.library.memshard_adam_rows(ctypes.byref(arguments))
        return None


def build() -> CpuRows:
    """Compile and load the kernels; raises as `load_library`."""
    library = load_library(_SOURCE)
    # ctypes takes results for 32-bit integers unless told.
    library.memshard_sort_reads.restype = _SIZE
    for name, types in _ARGUMENTS.items():
        getattr(library, name).argtypes = types
    return CpuRows(library)


def _int32(rows: Tensor) -> Tensor:
    return rows.to(torch.int32).contiguous()
