"""Replace the tables of a model by sharded ones."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from memshard.models.memory.table import ValueTable, find_tables
from memshard.parallel.tables.columns import ColumnShardedTable
from memshard.parallel.tables.rows import RowShardedTable
from memshard.parallel.tables.sharded import ShardedTable
from memshard.parallel.tables.unique import UniqueRowTable

Layout = Literal["rows", "columns", "tensor"]
Exchange = Literal["pooled", "unique"]


def shard_tables(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    average: bool = True,
    layout: Layout = "rows",
    exchange: Exchange = "pooled",
    replicas: dist.ProcessGroup | None = None,
) -> list[ValueTable]:
    """Split every table of the model over the ranks of a group (default: all), hide them, and
    return them.

    Values are kept: each rank cuts its part from its own copy, so all ranks must hold the same
    model; a table on the meta device stays there. average: divide row gradients by the number of
    ranks, to match DDP, where each rank's loss is a mean over its own tokens; False where the
    losses of the ranks add up to the total. layout: rows or columns, or tensor, columns of ranks
    that read the same for the same tokens; exchange: of rows, whether the owner pools sums or sends
    unique rows. replicas: the ranks that hold the same part in other groups.
    """
    group = group or dist.group.WORLD
    assert group is not None
    rows = UniqueRowTable if exchange == "unique" else RowShardedTable
    forms: dict[Layout, Callable[..., ShardedTable]] = {
        "rows": rows,
        "columns": ColumnShardedTable,
        "tensor": partial(ColumnShardedTable, same_reads=True),
    }
    sharded: dict[nn.Module, ShardedTable] = {}
    for _, table in find_tables(model):
        shard = sharded[table] = _shard(table, forms[layout], group, replicas)
        shard.gradient_scale = 1 / (shard.ranks * shard.replica_count) if average else 1.0
    for module in list(model.modules()):
        # Not named_children(), which leaves out the second name of a shared table.
        for name, child in list(module._modules.items()):
            if child in sharded:
                setattr(module, name, sharded[child])
    return list(sharded.values())


def _shard(
    table: ValueTable,
    form: Callable[..., ShardedTable],
    group: dist.ProcessGroup,
    replicas: dist.ProcessGroup | None,
) -> ShardedTable:
    with torch.device("meta"):
        shard = form(table.slots, table.dim, group, replicas)
    rows = slice(shard.first_row, shard.first_row + len(shard.weight))
    shard.set_values(
        table.weight.data[rows, shard.local_columns.start : shard.local_columns.stop].clone(
            memory_format=torch.contiguous_format
        )
    )
    return shard
