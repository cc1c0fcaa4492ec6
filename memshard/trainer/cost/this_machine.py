"""Measure the machine that this process runs on: free memory, arithmetic, memory bandwidth."""

import os
import time
from functools import cache
from pathlib import Path

import torch

from memshard.trainer.cost.devices import CARD_FLOPS, CARDS, Device
from memshard.trainer.precision import DTYPES
from memshard.variables import read_number

_CGROUPS = Path("/sys/fs/cgroup")
_LOOPBACK = 1e9
"""Bytes a second between processes of a machine over gloo: assumed."""

_SECONDS = 0.1
"""How long the measurement of matrix products takes."""


def device_named(name: str, ranks: int) -> Device:
    """Return a card by its name, or for `cpu` this machine, shared by `ranks` ranks, each with as
    many threads as this process. Measures for under a second.
    """
    if name != "cpu":
        return CARDS[name]
    flops, bandwidth = _measured_cpu()
    share = min(1.0, (os.cpu_count() or 1) / (torch.get_num_threads() * ranks))
    return Device(
        "cpu",
        memory=available_memory(torch.device("cpu"), ranks_here=ranks),
        flops={precision: figure * share for precision, figure in flops.items()},
        bandwidth=bandwidth / ranks,
        link=_LOOPBACK,
        network=_LOOPBACK,
        half="fp32",
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second that a device's matrix units can do at best:
    the measure of MFU.

    From the data sheet for known cards, else the best of some matrix products now, with the current
    number of threads, in under 0.3 s.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        precision = next((key for key, value in DTYPES.items() if value == dtype), "")
        for card, figures in CARD_FLOPS.items():
            if card in name and precision in figures:
                return figures[precision]
    return _measured_flops(device, dtype)


def available_memory(device: torch.device, ranks_here: int | None = None) -> float:
    """Return the bytes that a rank may still take: free memory of a CUDA device; on CPU what the
    machine and its cgroup (SLURM, containers) leave, shared by the ranks on this machine.

    ranks_here: by default LOCAL_WORLD_SIZE.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    ranks_here = ranks_here or read_number(os.environ, "LOCAL_WORLD_SIZE", "1", least=1)
    return min(_machine_memory(), *_cgroup_limits()) / ranks_here


def _machine_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024


def _cgroup_limits() -> list[float]:
    """Return the memory limits of this process's cgroup and of those above it, versions 1 and 2."""
    limits = [float("inf")]
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return limits
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        # A limit of any parent also counts; SLURM sets it on the job, not on the task.
        for folder in (group, *group.parents):
            file = folder / name
            if folder.is_relative_to(root) and file.is_file():
                text = file.read_text(encoding="utf-8").strip()
                limits.append(float("inf") if text == "max" else float(text))
    return limits


@cache
def _measured_cpu() -> tuple[dict[str, float], float]:
    """Return operations a second by precision, and bytes a second."""
    cpu = torch.device("cpu")
    flops = {name: peak_flops(cpu, dtype) for name, dtype in DTYPES.items() if name != "fp16"}
    flops["fp16"] = flops["bf16"]  # not a choice on CPU; the trainer's figure for MFU
    x = torch.ones(1 << 24)
    y = torch.empty_like(x)
    # Once before the clock starts: the system gives memory when it is first written.
    y.copy_(x)
    begun = time.perf_counter()
    for _ in range(3):
        y.copy_(x)
    return flops, 3 * 2 * x.nbytes / (time.perf_counter() - begun)


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    best, size = 0.0, 256
    begun = time.perf_counter()
    a = torch.ones(size, size, device=device, dtype=dtype)
    while not best or time.perf_counter() - begun < _SECONDS:
        seconds = _product_seconds(a)
        best = max(best, 2 * size**3 / seconds)
        # Larger products are more efficient; one of twice the size takes eight times as long.
        if seconds < _SECONDS / 20 and size < 8192:
            size *= 2
            a = torch.ones(size, size, device=device, dtype=dtype)
    return best


def _product_seconds(a: torch.Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    begun = time.perf_counter()
    torch.mm(a, a)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - begun
