"""How much memory a rank may still take."""

import os
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")


def available_memory(device: torch.device, ranks_here: int | None = None) -> float:
    """Bytes: free memory of a CUDA device; on CPU what the machine and its cgroup (SLURM,
    containers) leave, shared by its ranks.

    ranks_here: ranks on this machine, by default LOCAL_WORLD_SIZE.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    ranks_here = ranks_here or int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return min(_machine_memory(), *_cgroup_limits()) / ranks_here


def _machine_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024


def _cgroup_limits() -> list[float]:
    """Limits of this process's cgroup and of those above it, versions 1 and 2."""
    limits = [float("inf")]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
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
        for folder in (group, *group.parents):
            file = folder / name
            if folder.is_relative_to(root) and file.is_file():
                text = file.read_text().strip()
                limits.append(float("inf") if text == "max" else float(text))
    return limits
