"""Spread a built model over a mesh."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from memshard.models.memory.query_norm import QueryNorm
from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.parallel.collectives import differentiable_sum
from memshard.parallel.spec import ShardSpec
from memshard.parallel.tables.shard import shard_tables


def apply(model: nn.Module, mesh: DeviceMesh | None) -> dict[str, ShardSpec]:
    """Hide the model's tables, split them over the memory axis, and sum query statistics over the data axes.

    The losses of the ranks must add up to the loss of the batch. Returns the placement of every tensor that is split, by
    its name in `state_dict()`; whatever it does not list is the same on all ranks.
    """
    if mesh is None:
        externalize_tables(model)
        return {}
    memory = mesh.get_group("memory")
    shard_tables(model, memory, average=False)
    for module in model.modules():
        if isinstance(module, QueryNorm):
            module.reduce = lambda x: differentiable_sum(x, memory)
    # A shared table stands in `state_dict()` under the name of every reader.
    names = (name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, ValueTable))
    return {f"{name}.weight": ShardSpec(dim=0, axis="memory") for name in names}
