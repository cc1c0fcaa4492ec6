"""The names of torch.distributed that memshard uses although torch does not promise to keep them.

All of them are here, and each says what happens without it. (fairscale's are in `tensor.py`, the
only file that imports fairscale.)
"""

import json
from collections.abc import Iterable
from datetime import timedelta
from inspect import signature
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel


def process_groups() -> Iterable[dist.ProcessGroup]:
    """Return all groups that this process is in; without the name, only the default group."""
    world = getattr(distributed_c10d, "_world", None)
    groups: Iterable[dist.ProcessGroup] = getattr(world, "pg_map", None) or [dist.group.WORLD]
    return groups


def takes(group: dist.ProcessGroup | None, device: str) -> bool:
    """Return whether a group (None: all) takes tensors on a type of device; no without the name."""
    group = group or dist.group.WORLD
    return device in {x.type for x in getattr(group, "_device_types", ())}


def flatten(mesh: DeviceMesh) -> DeviceMesh:
    """Return the one-dimensional mesh over all axes of a mesh. RuntimeError without the name."""
    if not hasattr(mesh, "_flatten"):
        raise RuntimeError("this torch cannot join axes of a device mesh: use 2.13")
    return mesh._flatten()


def all_gather_single(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `out` with every rank's x, one after the other; by its old name before torch 2.13."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x, group=group)


def reduce_scatter_single(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `out` with this rank's part of the sum of every rank's x; by its old name before torch
    2.13.
    """
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(out, x, group=group)


def without_buffer_broadcasts() -> dict[str, Any]:
    """Return the argument of DistributedDataParallel with which forward passes leave buffers alone;
    torch 2.13 renamed it.
    """
    names = signature(DistributedDataParallel).parameters
    new = "forward_sync_buffers"
    return {new if new in names else "broadcast_buffers": False}


def set_timeout(group: dist.ProcessGroup, seconds: float) -> None:
    """Set how long collectives of a group wait for a rank; without the name they wait as long as
    they did.
    """
    set_pg_timeout = getattr(distributed_c10d, "_set_pg_timeout", None)
    if set_pg_timeout is not None:
        set_pg_timeout(timedelta(seconds=seconds), group)


def last_collectives() -> bytes:
    """Return the last collectives of this rank as JSON, NCCL's if there are any. RuntimeError
    without the names, or if torch has not recorded them.
    """
    from torch._C import _distributed_c10d

    record: bytes | None = None
    # Two recorders: NCCL, in builds that have it, writes into its own.
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        if (dump := getattr(_distributed_c10d, name, None)) is not None:
            record = dump()
            if json.loads(record).get("entries"):
                break
    if record is None:
        raise RuntimeError("this torch does not record its last collectives")
    return record


def init_fake_group(rank: int, ranks: int) -> bool:
    """Make this process believe that it is one rank of many, whose collectives do nothing. Return
    False, and do nothing, without the name.
    """
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError:
        return False
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    return True
