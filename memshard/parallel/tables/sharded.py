"""The base of all tables that are split over ranks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from memshard.models.memory.row_gradient import SortedReads, sort_reads
from memshard.models.memory.table import ValueTable
from memshard.parallel.collectives import Traffic, all_sum, share_count
from memshard.parallel.tables.layouts import Layout
from memshard.parallel.tables.replicas import add_replicas

_SAMPLE_EVERY = 64


class ShardedTable(ValueTable):
    """A table split over the ranks of `group`, hidden from the start.

    All ranks of the group must read at the same time, if only for 0 tokens, and step at the same
    time. replicas: the ranks of all groups that store the same part, this one included; their row
    gradients are summed.
    """

    layout: ClassVar[Layout]
    split = True

    def __init__(
        self,
        slots: int,
        dim: int,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        local_rows: range,
        local_columns: range | None = None,
    ) -> None:
        super().__init__(slots, dim, local_rows, local_columns)
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.replicas = (
            replicas if replicas is not None and dist.get_world_size(replicas) > 1 else None
        )
        self.replica_count = 1 if self.replicas is None else dist.get_world_size(self.replicas)
        self.traffic = Traffic()
        self._duplicates: Tensor | None = None
        self._calls = 0
        self.equal_shares = False
        """Whether all ranks are known to read for as many tokens; see `equal_shares`."""
        self.hide()

    @property
    def duplicates(self) -> float | None:
        """Mean number of reads of a row that this rank reads at all, in one micro-batch; measured
        in one of 64. Waits for the device.
        """
        return None if self._duplicates is None else float(self._duplicates)

    @property
    def spec_dim(self) -> int:
        """The dim of the whole table that the ranks split, as `torch.chunk` cuts it."""
        return self.layout.split_dim

    def tokens_of_ranks(self, tokens: int, device: torch.device) -> list[int]:
        """Return for how many tokens each rank reads at this time, as this one does for `tokens`.
        device: of the tokens.
        """
        if self.equal_shares:
            return [tokens] * self.ranks
        return share_count(tokens, self.group, device)

    def sum_over_shards(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks of the group, which must all call it."""
        return all_sum(x, self.group)

    def gradients(self, scale: float | Tensor) -> Iterator[SortedReads]:
        """Do what `ValueTable.gradients` does; all replicas must call it."""
        merged = sort_reads(self.reads, self.backend, len(self.weight))
        merged = merged if merged is None else merged.scaled(scale)
        if self.replicas is not None:
            yield from add_replicas(
                merged,
                len(self.weight),
                self.weight.shape[1],
                self.anchor,
                self.replicas,
                self.traffic,
                self.backend,
            )
        elif merged is not None:
            yield merged

    def as_whole(self, part: Tensor) -> Tensor:
        """Do what `ValueTable.as_whole` does: a DTensor over the group, without communication, as
        torch.distributed.checkpoint and FSDP2's state dicts read it.
        """
        if self.ranks == 1 or part.ndim <= self.spec_dim:
            # Where ranks split columns, every rank has the states with one number for each row.
            return part
        # A mesh of the table's device, which may be the host's. It is never sent over by us.
        device = "cpu" if part.is_meta else part.device.type
        mesh = DeviceMesh.from_group(self.group, device)
        return describe_part(part, mesh, self.spec_dim, (self.slots, self.dim)[self.spec_dim])

    def part_of(self, whole: Tensor) -> Tensor:
        """Do what `ValueTable.part_of` does; the part of a whole plain tensor is a copy."""
        if self.ranks == 1 or whole.ndim <= self.spec_dim:
            return super().part_of(whole)
        size = (self.slots, self.dim)[self.spec_dim]
        if isinstance(whole, DTensor):
            rank, axis = dist.get_rank(self.group), whole.device_mesh
            if (
                (axis.size(), axis.get_coordinate()) == (self.ranks, (rank,))
                and whole.placements == (Shard(self.spec_dim),)
                and whole.shape[self.spec_dim] == size
            ):
                return whole.to_local()
            problem = f"it is not the part of the table that process {rank} of {self.ranks} stores"
        elif whole.shape[self.spec_dim] == size:
            part = shard_range(size, self.group)
            return whole.narrow(self.spec_dim, part.start, len(part)).clone(
                memory_format=torch.contiguous_format
            )
        else:
            problem = (
                f"its shape is {tuple(whole.shape)}, and the whole table is {self.slots} x "
                f"{self.dim}; it may be one process's part of it"
            )
        raise ValueError(
            f"{problem}: save full_state_dict(model, optimizer), called on all processes, or use "
            "torch.distributed.checkpoint"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.as_whole(self.weight)

    def _count(self, rows: Tensor) -> None:
        super()._count(rows)
        if self._calls % _SAMPLE_EVERY == 0 and rows.numel():
            # In each call, sorting would cost as much as the lookup's own bookkeeping.
            ascending = rows.flatten().sort().values
            self._duplicates = rows.numel() / (1 + (ascending.diff() != 0).sum())
        self._calls += 1

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a model whose tables are split cannot be pickled whole, as torch.save(model) does: "
            "save full_state_dict(model, optimizer), called on all processes, or use "
            "torch.distributed.checkpoint"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedTable":
        # A process group cannot be copied; the copy works with the same ranks.
        memo[id(self.group)] = self.group
        memo[id(self.replicas)] = self.replicas
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__setstate__(deepcopy(self.__getstate__(), memo))
        return copy


@contextmanager
def equal_shares(tables: Iterable[ValueTable], equal: bool) -> Iterator[None]:
    """In the block, where `equal`, spare split tables asking how many tokens the other ranks have:
    as many as this one, in each read.
    """
    split = [table for table in tables if isinstance(table, ShardedTable)]
    for table in split:
        table.equal_shares = equal
    try:
        yield
    finally:
        for table in split:
            table.equal_shares = False


def shard_range(size: int, group: dist.ProcessGroup, rank: int | None = None) -> range:
    """Return the part of `size` rows or columns that a rank (default: this one) stores.

    Cut as `torch.chunk` does; the last ranks may have none.
    """
    # Rounded up, as torch.chunk does, so that checkpoints can describe the shards as DTensors.
    width = -(-size // dist.get_world_size(group))
    first = min((dist.get_rank(group) if rank is None else rank) * width, size)
    return range(first, min(first + width, size))


def describe_part(local: Tensor, mesh: DeviceMesh, dim: int, size: int) -> DTensor:
    """Return this rank's shard of a tensor, whose dim `dim` of global size `size` is split along a
    mesh of one axis, as a tensor of global shape. It shares the shard's memory.
    """
    shape = [*local.shape]
    shape[dim] = size
    # A meta tensor has the strides of the whole table without its memory.
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local.detach(), mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride
    )
