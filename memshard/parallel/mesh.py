"""How ranks are arranged."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(device_type: str) -> DeviceMesh | None:
    """The mesh with axes (replica, memory, tensor) over all ranks; None for a single process.

    Data parallelism spans replica and memory; each value table is split over the memory axis.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return init_device_mesh(device_type, (1, dist.get_world_size(), 1), mesh_dim_names=("replica", "memory", "tensor"))
