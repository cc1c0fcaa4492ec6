"""Replace the tables of a model by sharded ones."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from memshard.models.load_class import load_class
from memshard.models.memory.layer import MemoryLayer
from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.parallel.tables.layouts import Layouts, layout_named
from memshard.parallel.tables.sharded import ShardedTable

TableClass = Callable[[int, int, dist.ProcessGroup, dist.ProcessGroup | None], ShardedTable]
"""A sharded table from slots, dim, its ranks, and the ranks that store the same shard."""


def shard_tables(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    average: bool = True,
    layout: Layouts = "rows",
    replicas: dist.ProcessGroup | None = None,
) -> list[ValueTable]:
    """Split every table of the model over the ranks of a group (default: all, in a new group), hide
    the tables, and return them. All ranks call it.

    Values are kept: each rank cuts its shard from its own copy, so all ranks must have the same
    model; a table on the meta device stays there. average: divide row gradients by the number of
    ranks, to match DDP, where each rank's loss is a mean over its own tokens; False where the
    losses of the ranks add up to the total. layout: a name in `layouts.LAYOUTS`, ValueError for
    any other; or one for each kind of table, `memory` and `ngram` ("rows" for those not named).
    replicas: the ranks that store the same shard in other groups. RuntimeError
    without a process group, ValueError if the tables are split already.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "shard_tables needs a process group: call torch.distributed.init_process_group first "
            "(Hugging Face's TrainingArguments do, under torchrun), or externalize_tables(model) "
            "for a single process"
        )
    # DDP sends its buckets through the default group, where reads would queue behind them.
    group = group or dist.new_group()
    assert group is not None
    sections = {
        table: layer.section
        for layer in model.modules()
        if isinstance(layer, MemoryLayer)
        for table in layer.tables
    }
    sharded: dict[nn.Module, ShardedTable] = {}
    tables = externalize_tables(model)
    if any(isinstance(table, ShardedTable) for table in tables):
        raise ValueError(
            "the model's tables are split already: use what shard_tables returned, or find_tables"
        )
    for table in tables:
        section = sections.get(table, "memory")
        name = layout if isinstance(layout, str) else layout.get(section, "rows")
        table_class: TableClass = load_class(layout_named(name).table)
        shard = sharded[table] = _shard(table, table_class, group, replicas)
        shard.gradient_scale = 1 / (shard.ranks * shard.replica_count) if average else 1.0
    for module in list(model.modules()):
        # named_children() would leave out the second name of a shared table.
        for name, child in list(module._modules.items()):
            if child in sharded:
                setattr(module, name, sharded[child])
    return list(sharded.values())


def _shard(
    table: ValueTable,
    table_class: TableClass,
    group: dist.ProcessGroup,
    replicas: dist.ProcessGroup | None,
) -> ShardedTable:
    # The constructor would draw values that the next lines replace.
    with torch.device("meta"):
        shard = table_class(table.slots, table.dim, group, replicas)
    rows = slice(shard.first_row, shard.first_row + len(shard.weight))
    shard.set_values(
        table.weight[rows, shard.local_columns.start : shard.local_columns.stop].clone(
            memory_format=torch.contiguous_format
        )
    )
    # What is frozen stays frozen.
    shard.anchor.requires_grad_(table.anchor.requires_grad)
    shard.follows_layer = table.follows_layer
    return shard
