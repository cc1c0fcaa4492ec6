"""How ranks are arranged."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(device_type: str, memory: int | None = None) -> DeviceMesh | None:
    """The mesh with axes (replica, memory, tensor) over all ranks; None for a single process.

    Data parallelism spans replica and memory; each value table is split over the memory axis, of `memory` neighbouring
    ranks (default: all), and copied along the replica axis. ValueError if that does not divide the ranks.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    memory = memory_ranks(memory, ranks)
    if ranks == 1:
        return None
    return init_device_mesh(device_type, (ranks // memory, memory, 1), mesh_dim_names=("replica", "memory", "tensor"))


def memory_ranks(memory: int | None, ranks: int) -> int:
    """How many ranks split a table. memory: as the recipe says it, None for all."""
    memory = memory or ranks
    if ranks % memory:
        raise ValueError(f"parallel.memory is {memory}, which does not divide the {ranks} ranks: use a divisor, or null for all ranks")
    return memory
