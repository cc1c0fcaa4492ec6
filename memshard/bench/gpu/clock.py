"""How long a call takes on the device, and what its memory and its matrix units can do at best."""

import statistics
import time
from collections.abc import Callable

import torch

_CACHE = 1 << 28
"""Bytes written before each call: five times the largest cache (50 MB, of an H200)."""


def seconds(call: Callable[[], object], device: torch.device, budget: float = 0.3) -> float:
    """Return the median time of a call, with a cold cache on a GPU, of 5 to 100 calls within
    `budget` seconds; two calls before them do not count: they compile and allocate.
    """
    call()
    begun = time.perf_counter()
    _once(call, device, None)
    repeats = min(100, max(5, int(budget / max(1e-9, time.perf_counter() - begun))))
    cuda = device.type == "cuda"
    flushed = torch.empty(_CACHE, dtype=torch.uint8, device=device) if cuda else None
    return statistics.median(_once(call, device, flushed) for _ in range(repeats))


def _once(call: Callable[[], object], device: torch.device, flushed: torch.Tensor | None) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    if flushed is not None:
        flushed.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def copy_rate(device: torch.device) -> float:
    """Return bytes a second, read and written, of copying 1 GiB (64 MiB on a CPU)."""
    source = torch.zeros(1 << (28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.itemsize / seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations a second of a product of random matrices, of 8,192 rows (512 on a CPU).

    Random: products of zeros draw less power, and were a seventh faster on an H200.
    """
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device)
