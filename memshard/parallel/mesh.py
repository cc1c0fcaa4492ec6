"""The mesh: how ranks are arranged, and the process groups along its axes."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from memshard.parallel import compat

AXES = ("replica", "memory", "tensor")
"""Axes of the mesh; ranks along the last one are neighbours."""

DATA = ("replica", "memory")
"""Axes of ranks that train on different sequences; ranks along `tensor` share theirs."""


def build_mesh(device_type: str, memory: int | None = None, tensor: int = 1) -> DeviceMesh | None:
    """Return the mesh over all ranks, with the axes `AXES`; None for a single process.

    tensor: number of neighbouring ranks that share the dense matrices and the tokens of a sequence.
    memory: number of neighbouring ranks, in whole tensor groups, that split a value table (default:
    all); the table is copied along the replica axis. ValueError if they do not divide.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    tensor_ranks(tensor, ranks)
    memory = memory_ranks(memory, ranks, tensor)
    if ranks == 1:
        return None
    return init_device_mesh(
        device_type,
        # Neighbours are most likely on one node: the axis that sends most, tensor, comes last.
        (ranks // memory, memory // tensor, tensor),
        mesh_dim_names=AXES,
    )


def flat(mesh: DeviceMesh, axes: tuple[str, ...]) -> DeviceMesh:
    """Return the flat mesh of the ranks that differ from this one along some axes only."""
    used = _used(mesh, axes)
    return mesh[used[0]] if len(used) == 1 else compat.flatten(mesh[used])


def _used(mesh: DeviceMesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the axes of more than one rank, or else the first."""
    # Equal sets of ranks then share a process group: each costs NCCL buffers and a connection.
    return tuple(axis for axis in axes if mesh[axis].size() > 1) or axes[:1]


def group(mesh: DeviceMesh, axes: tuple[str, ...]) -> dist.ProcessGroup:
    """Return the process group of the ranks that differ from this one along some axes only."""
    return flat(mesh, axes).get_group()


def groups_beside_ddp(mesh: DeviceMesh, *sets: tuple[str, ...]) -> list[dist.ProcessGroup]:
    """Return the process group of each set of axes, never that along `DATA`: DDP sends its buckets
    there, and in one communicator what backward exchanges would queue behind them. All ranks call
    it.
    """
    ddp = _used(mesh, DATA)
    groups = [group(mesh, axes) for axes in sets]
    shared = [_used(mesh, axes) == ddp for axes in sets]
    if any(shared) and flat(mesh, DATA).size() > 1:
        along, other = (
            [AXES.index(axis) for axis in AXES if (axis in ddp) is inside]
            for inside in (True, False)
        )
        sharers = mesh.mesh.permute(*other, *along).flatten(-len(along)).flatten(0, -2)
        new, _ = dist.new_subgroups_by_enumeration(sharers.tolist())
        groups = [new if same else old for same, old in zip(shared, groups, strict=True)]
    return groups


def tensor_size(mesh: DeviceMesh | None) -> int:
    """Return how many ranks train on the same sequences."""
    return 1 if mesh is None else mesh["tensor"].size()


def tensor_ranks(tensor: int, ranks: int) -> int:
    """Return `tensor`. ValueError if it does not divide the ranks."""
    if ranks % tensor:
        raise ValueError(
            f"parallel.tensor is {tensor}, which does not divide the number of ranks, {ranks}: "
            "use a divisor, or other ranks"
        )
    return tensor


def memory_ranks(memory: int | None, ranks: int, tensor: int = 1) -> int:
    """Return how many ranks split a table. memory: the recipe's key, None for all. ValueError if it
    does not divide the ranks, or cuts through a tensor group.
    """
    memory = memory or ranks
    if ranks % memory:
        raise ValueError(
            f"parallel.memory is {memory}, which does not divide the {ranks} ranks: use a "
            "divisor, or null for all ranks"
        )
    if memory % tensor:
        raise ValueError(
            f"parallel.memory is {memory} and parallel.tensor {tensor}: a table is split over "
            "whole tensor-parallel groups, "
            f"so use a multiple of {tensor}, or null for all ranks"
        )
    return memory
