"""Which path table reads and updates take: the fastest kernels that are there and right, else plain
torch.
"""

import os
import subprocess
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from memshard.models.kernels import plain
from memshard.models.kernels.cpu_rows import build
from memshard.models.kernels.cpu_topk import CompiledSearch
from memshard.models.kernels.cpu_topk import build as build_search

SWITCH = "MEMSHARD_KERNELS"
_HALF = (torch.float16, torch.bfloat16)
_TRITON_FROM = (8, 0)


class Kernels(Protocol):
    """What a fast path offers: the functions of plain.py, and the update."""

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
    def adam_rows(self, tensors: dict[str, Tensor | None], numbers: dict[str, float]) -> None: ...


def kernels_for(values: Tensor, sums: Tensor) -> Kernels | None:
    """The kernels, if there are any that serve such tensors. sums: weights or gradients."""
    serves = (
        values.device == sums.device
        and sums.dtype == torch.float32
        and (values.dtype == torch.float32 or values.dtype in _HALF)
        and values.shape[1] > 0
        and len(values) < 2**31
        and not torch.compiler.is_compiling()
    )
    return chosen(values.device)[0] if serves else None


@cache
def chosen(device: torch.device) -> tuple[Kernels | None, str]:
    """The kernels of a device or None, and in words what they are and why. Built and tested against
    plain torch at the first call.
    """
    if os.environ.get(SWITCH) == "plain":
        return None, f"plain torch ({SWITCH}=plain)"
    kernels, name = (
        _triton(device)
        if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        else _compiled(device)
    )
    if kernels is None:
        return None, f"plain torch ({name})"
    for dtype in (torch.float32, *_HALF):
        try:
            right = _agrees(kernels, dtype, device)
        except Exception as problem:
            # Triton compiles at the first call: whatever goes wrong there must not stop a run.
            return (
                None,
                f"plain torch ({name} fail in {dtype}: {' '.join(str(problem).split())[:200]})",
            )
        if not right:
            return None, f"plain torch ({name} disagree with it in {dtype})"
    return kernels, f"{name} (they agree with plain torch)"


def search_for(scores: Tensor) -> CompiledSearch | None:
    """The compiled product-key search, if there is one that serves such scores."""
    serves = (
        scores.device.type == "cpu"
        and scores.dtype == torch.float32
        and not torch.compiler.is_compiling()
    )
    return _compiled_search() if serves else None


@cache
@torch.no_grad()
def _compiled_search() -> CompiledSearch | None:
    """Built and tested, on scores with and without ties, at the first call."""
    if os.environ.get(SWITCH) == "plain":
        return None
    try:
        search = build_search()
    except (OSError, subprocess.SubprocessError):
        return None
    k, generator = 5, torch.Generator(device="cpu").manual_seed(0)
    ranks = torch.arange(k, device="cpu")
    pairs = ranks.repeat_interleave(k), ranks.repeat(k)
    for keys, levels in ((5, 2), (90, 3), (90, 1_000_000)):
        halves = torch.randint(
            -levels, levels + 1, (2, 20, keys), generator=generator, device="cpu"
        ).float()
        values, order = torch.sort(halves, dim=-1, descending=True, stable=True)
        sums = values[0][:, pairs[0]] + values[1][:, pairs[1]]
        chosen = torch.sort(sums, dim=-1, descending=True, stable=True).indices[:, :k]
        right = torch.stack([order[half].gather(1, pairs[half][chosen]) for half in (0, 1)])
        if not torch.equal(search(halves[0], halves[1], pairs, k).long(), right):
            return None
    return search


def _compiled(device: torch.device) -> tuple[Kernels | None, str]:
    """Kernels for CPUs and their name, or why there are none."""
    if device.type != "cpu":
        return None, f"no kernels for {device.type}"
    try:
        return build(), "compiled kernels"
    except (OSError, subprocess.SubprocessError) as problem:
        return None, f"no compiled kernels: {problem}"


def _triton(device: torch.device) -> tuple[Kernels | None, str]:
    """Kernels for GPUs and their name, or why there are none."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _TRITON_FROM:
        return None, "Triton kernels need compute capability {}.{}, this is {}.{}".format(
            *_TRITON_FROM, *torch.cuda.get_device_capability(device)
        )
    try:
        from memshard.models.kernels import triton_rows
    except ImportError as problem:
        return None, f"no Triton kernels: {problem}"
    return (
        triton_rows,
        "Triton kernels" if device.type == "cuda" else "Triton kernels in the interpreter",
    )


@torch.no_grad()
def _agrees(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> bool:
    """Uneven and empty bags, repeated rows, a dim that fills no vector and one that does."""
    generator = torch.Generator().manual_seed(0)
    for dim in (37, 48):
        values = torch.randn(29, dim, generator=generator).to(device, dtype)
        rows = torch.randint(29, (50,), generator=generator, dtype=torch.int32).to(device)
        weights, upstream = (
            torch.randn(50, generator=generator).to(device),
            torch.randn(6, dim, generator=generator).to(device),
        )
        offsets = torch.tensor([0, 0, 7, 8, 30, 50], device=device)
        pairs = (
            (
                kernels.gather_sum(values, rows, weights, offsets),
                plain.gather_sum(values, rows, weights, offsets),
            ),
            (
                kernels.score_gradients(values, rows, offsets, upstream),
                plain.score_gradients(values, rows, offsets, upstream),
            ),
            (
                kernels.segment_sums(values, rows, weights, offsets[2:]),
                plain.segment_sums(values, rows, weights, offsets[2:]),
            ),
            (kernels.sort_reads(rows)[0].long(), plain.sort_reads(rows)[0]),
        )
        if not all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) for ours, theirs in pairs):
            return False
    return True
