"""The tensors of a checkpoint, by name and global shape."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from memshard.models.memory.table import ValueTable, find_tables
from memshard.parallel.spec import ShardSpec
from memshard.trainer.optim.row_adam import RowAdam

_MOMENTS = ("exp_avg", "exp_avg_sq")


def model_tensors(model: nn.Module, placement: dict[str, ShardSpec], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Parameters, buffers and tables as `model.<name>`; tensors that `placement` splits come as DTensors over their axis.

    The tensors share memory with the model, so loading into them loads the model. A shared table comes once.
    """
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors |= dict(model.named_buffers())
    for name, table in find_tables(model):
        tensors[f"{name}.weight"] = _global(f"{name}.weight", table.weight, table, placement, mesh)
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def optimizer_tensors(
    model: nn.Module, dense: Optimizer, rows: RowAdam | None, placement: dict[str, ShardSpec], mesh: DeviceMesh | None
) -> dict[str, Tensor]:
    """Moments and step counts of the dense parameters that `dense` updates, and all that is kept for the rows of tables, as
    `exp_avg.<name>` and so on.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key in (*_MOMENTS, "step"):
            if parameter in dense.state:
                tensors[f"{key}.{name}"] = dense.state[parameter][key]
    if rows is None:
        return tensors
    for table_name, table in find_tables(model):
        name = f"{table_name}.weight"
        for key, value in rows.state[table.anchor].items():
            if isinstance(value, Tensor):
                tensors[f"{key}.{name}"] = _global(name, value, table, placement, mesh)
    return tensors


def _global(name: str, local: Tensor, table: ValueTable, placement: dict[str, ShardSpec], mesh: DeviceMesh | None) -> Tensor:
    """local: the values of this rank's part of a table, or what the optimizer keeps for them."""
    if name not in placement:
        return local.detach()
    assert mesh is not None
    spec = placement[name]
    if spec.dim >= local.ndim:
        # A number a row, while the ranks split columns: each has them all.
        return local.detach()
    places = [Replicate(), Shard(spec.dim)]
    shape, stride = ((table.slots, table.dim), (table.dim, 1)) if local.ndim > 1 else ((table.slots,), (1,))
    return DTensor.from_local(local.detach(), mesh["replica", spec.axis], places, run_check=False, shape=torch.Size(shape), stride=stride)
