"""Which code reads and updates table rows on a device: the fastest that is there and right.

A table asks once, when it is placed on a device, and keeps the answer as `table.backend`. Nobody
else asks whether there are kernels: a backend hands to plain torch whatever it does not serve
(fp64, code that torch.compile traces, rows of no columns).
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from memshard.models.compat import is_traced, outside_modes
from memshard.models.kernels import cpu_rows, cpu_topk, plain_rows
from memshard.models.kernels.compile_cpp import CompileError
from memshard.models.kernels.plain_rows import AdamUpdate
from memshard.models.kernels.plain_topk import product_search
from memshard.models.kernels.self_test import lookup_agrees, row_backend_fault, search_agrees
from memshard.variables import switch

SWITCH = "MEMSHARD_KERNELS"
"""Environment variable; `plain` keeps everything to plain torch."""
_TRITON_FROM = (7, 0)
"""Compute capability from which Triton's kernels are tried; their self tests decide."""
_TENSOR_CORES_FROM = (8, 0)
"""The same for searches that score in tf32 or bf16."""

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
    def sort_reads(self, rows: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]: ...
    def adam_rows(self, update: AdamUpdate) -> None: ...


class Lookup(Protocol):
    """A search from queries to rows and weights; triton_lookup.py documents it."""

    def serves(self, queries: Tensor, sub_keys: Tensor, k: int) -> bool: ...
    def look_up(
        self, queries: Tensor, sub_keys: Tensor, k: int, weighting: str, precision: str = ...
    ) -> Tensor: ...
    def gradients(
        self,
        queries: Tensor,
        sub_keys: Tensor,
        rows: Tensor,
        weights: Tensor,
        upstream: Tensor,
        weighting: str,
        wanted: Sequence[bool] = ...,
    ) -> tuple[Tensor | None, Tensor | None]: ...


@cache
def backend_for(device: torch.device) -> tuple[RowBackend, str]:
    """Return the backend for tables on a device, and in words which it is and why.

    The first call for a device compiles the kernels, if need be, and tests
    them against plain torch.
    """
    if switch(SWITCH, "plain"):
        return plain_rows, f"plain torch ({SWITCH}=plain)"
    kernels, name = _triton(device) if _takes_triton(device) else _compiled(device)
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


def lookup_for(queries: Tensor, sub_keys: Tensor, k: int, precision: str = "fp32") -> Lookup | None:
    """Return the search without stored scores that serves these, or None where plain torch has to
    score all sub-keys and `search_for` says what searches.
    """
    # A traced graph cannot enter Triton either.
    if is_traced(queries) or not _takes_triton(queries.device):
        return None
    kernels = _lookup(queries.device, precision)
    return kernels if kernels is not None and kernels.serves(queries, sub_keys, k) else None


@cache
def _lookup(device: torch.device, precision: str) -> Lookup | None:
    """Compile and test the search at a device's first call."""
    if switch(SWITCH, "plain"):
        return None
    least = _TRITON_FROM if precision == "fp32" else _TENSOR_CORES_FROM
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < least:
        return None
    try:
        from memshard.models.kernels import triton_lookup
    except ImportError:
        return None
    with outside_modes():
        return triton_lookup if lookup_agrees(triton_lookup, device, precision) else None


def _takes_triton(device: torch.device) -> bool:
    # Triton's interpreter runs GPU kernels on a CPU, slowly: for tests.
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


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
