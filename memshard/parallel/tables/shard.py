"""Replace the tables of a model by sharded ones."""

import torch
import torch.distributed as dist
from torch import nn

from memshard.models.memory.table import ValueTable, find_tables
from memshard.parallel.tables.rows import RowShardedTable


def shard_tables(model: nn.Module, group: dist.ProcessGroup | None = None, average: bool = True) -> list[ValueTable]:
    """Split every table of the model by rows over the ranks of a group (default: all), hide them, and return them.

    Values are kept: each rank cuts its rows from its own copy, so all ranks must hold the same model; a table on the meta
    device stays there. average: divide row gradients by the number of ranks, to match DDP, where each rank's loss is a
    mean over its own tokens; False where the losses of the ranks add up to the total.
    """
    group = group or dist.group.WORLD
    assert group is not None
    sharded: dict[nn.Module, RowShardedTable] = {}
    for _, table in find_tables(model):
        sharded[table] = _shard(table, group)
        sharded[table].gradient_scale = 1 / dist.get_world_size(group) if average else 1.0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in sharded:
                setattr(module, name, sharded[child])
    return list(sharded.values())


def _shard(table: ValueTable, group: dist.ProcessGroup) -> RowShardedTable:
    with torch.device("meta"):
        shard = RowShardedTable(table.slots, table.dim, group)
    shard.hold(table.weight.data[shard.first_row : shard.first_row + len(shard.weight)].clone())
    return shard
