"""Describe a run's tensors as a checkpoint stores them: by name and global shape."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from memshard.models.memory.table import find_tables
from memshard.parallel.mesh import flat
from memshard.parallel.spec import ShardSpec
from memshard.parallel.tables.sharded import describe_part
from memshard.trainer.optim.rows.adam import RowAdam


def model_tensors(
    model: nn.Module, placement: dict[str, ShardSpec], mesh: DeviceMesh | None
) -> dict[str, Tensor]:
    """Return parameters, buffers and tables as `model.<name>`; tensors that `placement` splits are
    DTensors over their axes.

    The tensors share memory with the model, so loading into them loads the model. A shared table
    occurs once.
    """
    tensors = {
        name: global_tensor(name, p, placement, mesh) for name, p in model.named_parameters()
    }
    tensors |= dict(model.named_buffers())
    for name, table in find_tables(model):
        tensors[f"{name}.weight"] = global_tensor(f"{name}.weight", table.weight, placement, mesh)
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def optimizer_tensors(
    model: nn.Module,
    dense: Optimizer,
    rows: RowAdam | None,
    placement: dict[str, ShardSpec],
    mesh: DeviceMesh | None,
) -> dict[str, Tensor]:
    """Return all that `dense` keeps for the parameters it updates, and `rows` for the rows of
    tables, as `exp_avg.<name>` and so on.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in dense.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}.{name}"] = global_tensor(name, value, placement, mesh)
    if rows is None:
        return tensors
    for table_name, table in find_tables(model):
        name = f"{table_name}.weight"
        for key, value in rows.state[table.anchor].items():
            if isinstance(value, Tensor):
                tensors[f"{key}.{name}"] = global_tensor(name, value, placement, mesh)
    return tensors


def global_tensor(
    name: str, local: Tensor, placement: dict[str, ShardSpec], mesh: DeviceMesh | None
) -> Tensor:
    """Return `local`, this rank's shard of the named tensor or of an optimizer state of that shape,
    as a tensor of global shape.
    """
    spec = placement.get(name)
    # States with one number a row are not split where ranks split the columns.
    if spec is None or spec.dim >= local.ndim:
        return local.detach()
    assert mesh is not None
    axis = flat(mesh, spec.axes)
    if local.device.type != axis.device_type:
        # A DTensor moves to the device type of its mesh; this one only describes a table in host
        # memory, nothing is sent over it.
        axis = DeviceMesh(
            local.device.type, axis.mesh, mesh_dim_names=axis.mesh_dim_names, _init_backend=False
        )
    return describe_part(local, axis, spec.dim, spec.size)
