"""The base of all tables that are split over ranks."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.memory.row_gradient import SortedReads, sort_reads
from memshard.models.memory.table import ValueTable
from memshard.parallel.collectives import Traffic, all_sum
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
        self.duplicates: float | None = None
        """Mean number of reads of a row that this rank reads at all, in one micro-batch; measured
        in one of 64.
        """
        self._calls = 0
        self.hide()

    @property
    def spec_dim(self) -> int:
        """The dim of the whole table that the ranks split, as `torch.chunk` cuts it."""
        return self.layout.split_dim

    def sum_over_shards(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks of the group, which must all call it."""
        return all_sum(x, self.group)

    def gradients(self, scale: float) -> Iterator[SortedReads]:
        """Do what `ValueTable.gradients` does; all replicas must call it."""
        merged = sort_reads(self.reads, self.backend)
        merged = merged if merged is None else merged.scaled(scale)
        if self.replicas is not None:
            yield from add_replicas(
                merged,
                self.weight.shape[1],
                self.anchor,
                self.replicas,
                self.traffic,
                self.backend,
            )
        elif merged is not None:
            yield merged

    def _count(self, rows: Tensor) -> None:
        super()._count(rows)
        if self._calls % _SAMPLE_EVERY == 0 and rows.numel():
            # `unique` sorts: in each call it would cost as much as the lookup's own bookkeeping.
            self.duplicates = rows.numel() / len(torch.unique(rows))
        self._calls += 1

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            # Shards have the same shape, so nothing else tells them apart.
            destination._metadata[prefix[:-1]]["shard"] = dist.get_rank(self.group), self.ranks

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        shard, expected = metadata.get("shard"), (dist.get_rank(self.group), self.ranks)
        if shard is not None and shard != expected and f"{prefix}weight" in state_dict:
            errors.append(
                f"{prefix}weight is shard {shard[0]} of {shard[1]} of a table, and this rank has "
                f"shard {expected[0]} of {expected[1]}: save with full_state_dict and load with "
                "load_full_state_dict, or let every rank save and load its own state_dict()"
            )
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedTable":
        # A process group cannot be copied; the copy works with the same ranks.
        memo[id(self.group)] = self.group
        memo[id(self.replicas)] = self.replicas
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__setstate__(deepcopy(self.__getstate__(), memo))
        return copy


def shard_range(size: int, group: dist.ProcessGroup, rank: int | None = None) -> range:
    """Return the part of `size` rows or columns that a rank (default: this one) stores.

    Cut as `torch.chunk` does; the last ranks may have none.
    """
    # Rounded up, as torch.chunk does, so that checkpoints can describe the shards as DTensors.
    width = -(-size // dist.get_world_size(group))
    first = min((dist.get_rank(group) if rank is None else rank) * width, size)
    return range(first, min(first + width, size))
