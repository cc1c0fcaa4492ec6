"""Spread a built model over a mesh."""

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from memshard.models.memory.query_norm import QueryNorm
from memshard.models.memory.table import externalize_tables
from memshard.parallel.collectives import differentiable_sum
from memshard.parallel.spec import ShardSpec
from memshard.parallel.tables.shard import Exchange, Layout, shard_tables
from memshard.parallel.tables.sharded import ShardedTable


def apply(model: nn.Module, mesh: DeviceMesh | None, layout: Layout = "rows", exchange: Exchange = "pooled") -> dict[str, ShardSpec]:
    """Hide the model's tables, split them over the memory axis, and sum query statistics over the data axes.

    The losses of the ranks must add up to the loss of the batch. Returns the placement of every tensor that is split, by
    its name in `state_dict()`; whatever it does not list is the same on all ranks. layout, exchange: see `shard_tables`.
    """
    if mesh is None:
        externalize_tables(model)
        return {}
    shard_tables(model, mesh.get_group("memory"), average=False, layout=layout, exchange=exchange, replicas=mesh.get_group("replica"))
    data = dist.group.WORLD
    assert data is not None
    for module in model.modules():
        if isinstance(module, QueryNorm):
            module.reduce = lambda x: differentiable_sum(x, data)
    # A shared table stands in `state_dict()` under the name of every reader.
    tables = ((name, module) for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, ShardedTable))
    return {f"{name}.weight": ShardSpec(dim=table.spec_dim, axis="memory") for name, table in tables}
