"""Which code reads and updates table rows on a device: the fastest that is there and right.

A table asks once, when it is placed on a device, and keeps the answer as `table.backend`. Nobody
else asks whether there are kernels: a backend hands to plain torch whatever it does not serve
(fp64, code that torch.compile traces, rows of no columns).
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from memshard.models.compat import is_traced, outside_modes
from memshard.models.kernels import cpu_rows, cpu_topk, plain_rows
from memshard.models.kernels.compile_cpp import CompileError
from memshard.models.kernels.plain_rows import AdamUpdate
from memshard.models.kernels.plain_topk import product_search
from memshard.models.kernels.self_test import row_backend_fault, search_agrees
from memshard.variables import switch

SWITCH = "MEMSHARD_KERNELS"
"""Environment variable; `plain` keeps everything to plain torch."""
_TRITON_FROM = (8, 0)

ProductSearch = Callable[[Tensor, Tensor, int], Tensor]


class RowBackend(Protocol):
    """Everything done to the rows of a table; plain_rows.py documents it and is the reference."""

    def gather_sum(
        self, values: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor
    ) -> Tensor: ...
    def score_gradients(
        self, values: Tensor, rows: Tensor, offsets: Tensor, upstream: Tensor
    ) -> Tensor: ...
    def segment_sums(
        self, values: Tensor, rows: Tensor, weights: Tensor, starts: Tensor
    ) -> Tensor: ...
    def sort_reads(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def adam_rows(self, update: AdamUpdate) -> None: ...


@cache
def backend_for(device: torch.device) -> tuple[RowBackend, str]:
    """Return the backend for tables on a device, and in words which it is and why.

    The first call for a device compiles the kernels, if need be, and tests
    them against plain torch.
    """
    if switch(SWITCH, "plain"):
        return plain_rows, f"plain torch ({SWITCH}=plain)"
    # Triton's interpreter runs GPU kernels on a CPU, slowly: for tests.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    kernels, name = _triton(device) if device.type == "cuda" or interpreted else _compiled(device)
    if kernels is None:
        return plain_rows, f"plain torch ({name})"
    # A wrong kernel would train on silently, so it is tested once in every
    # process, and never trusted.
    with outside_modes():
        fault = row_backend_fault(kernels, device)
    if fault:
        return plain_rows, f"plain torch ({name} {fault})"
    return kernels, f"{name} (they agree with plain torch)"


def search_for(scores: Tensor) -> ProductSearch:
    """Return the search for the best product scores that serves such scores."""
    # Other devices and dtypes take torch's own top-k; a traced graph cannot enter C++ code it
    # does not know.
    if not scores.is_cpu or scores.dtype != torch.float32 or is_traced(scores):
        return product_search
    return _cpu_search()


@cache
def _cpu_search() -> ProductSearch:
    """Compile and test the search at the first call."""
    if switch(SWITCH, "plain"):
        return product_search
    try:
        search = cpu_topk.build()
    except CompileError:
        return product_search
    return search if search_agrees(search) else product_search


def _compiled(device: torch.device) -> tuple[RowBackend | None, str]:
    """Return the kernels of CPUs and their name, or None and why there are none."""
    if device.type != "cpu":
        return None, f"no kernels for {device.type}"
    try:
        return cpu_rows.build(), "compiled kernels"
    except CompileError as problem:
        return None, f"no compiled kernels: {problem}"


def _triton(device: torch.device) -> tuple[RowBackend | None, str]:
    """Return the kernels of GPUs and their name, or None and why there are none."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _TRITON_FROM:
        return None, "Triton kernels need compute capability {}.{}, this is {}.{}".format(
            *_TRITON_FROM, *torch.cuda.get_device_capability(device)
        )
    try:
        from memshard.models.kernels import triton_rows
    # Triton is not installed with torch on every platform.
    except ImportError as problem:
        return None, f"no Triton kernels: {problem}"
    name = "Triton kernels" if device.type == "cuda" else "Triton kernels in the interpreter"
    return triton_rows, name
