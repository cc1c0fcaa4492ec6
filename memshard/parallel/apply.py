"""Spread a built model over a mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from memshard.models.loss import token_losses
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.query_norm import QueryNorm
from memshard.models.memory.table import externalize_tables
from memshard.models.transformer import Transformer
from memshard.parallel.collectives import differentiable_sum
from memshard.parallel.mesh import DATA, TABLE, group, tensor_size
from memshard.parallel.segments import piece_losses, share_sequences
from memshard.parallel.sequence import gather, gathered, split
from memshard.parallel.spec import ShardSpec
from memshard.parallel.tables.shard_tables import Exchange, Layout, shard_tables
from memshard.parallel.tables.sharded import ShardedTable

Share = Literal["heads", "sequence"]


def apply(
    model: nn.Module,
    mesh: DeviceMesh | None,
    layout: Layout = "rows",
    exchange: Exchange = "pooled",
    share: Share = "heads",
) -> dict[str, ShardSpec]:
    """Hide the model's tables and split them, split the dense matrices over the tensor axis, and
    sum query statistics over all tokens.

    share: what ranks along the tensor axis share: "heads", the large matrices and between them the
    tokens of sequences, or "sequence", the tokens alone, through the states of fast weights;
    matrices are then whole.

    The losses of the ranks along the data axes must add up to the loss of the batch; along the
    tensor axis each rank has the same loss. Then the gradient of a split tensor is the sum over the
    data axes, that of any other the sum over all ranks (see `grad_norm.py`). Returns the placement
    of every tensor that is split, by its name in `state_dict()`; whatever it does not list is the
    same on all ranks. layout, exchange: see `shard_tables`. ValueError where sizes do not divide,
    or fairscale is missing.
    """
    if mesh is None:
        externalize_tables(model)
        return {}
    ranks, placement = tensor_size(mesh), {}
    if ranks > 1:
        if not isinstance(model, Transformer):
            raise ValueError(
                f"parallel.tensor is {ranks}, which is for memshard's Transformer: set it to 1 "
                f"for {type(model).__name__}"
            )
        if share == "sequence":
            share_sequences(model, group(mesh, ("tensor",)))
        else:
            from memshard.parallel.tensor import split_dense

            placement = split_dense(model, mesh)
    same_reads = layout == "tensor"
    axes, copies = (("tensor",), DATA) if same_reads else (TABLE, ("replica",))
    tables = shard_tables(
        model, group(mesh, axes), False, layout, exchange, replicas=group(mesh, copies)
    )
    if same_reads:
        for table in tables:
            table.gradient_scale = ranks
        for module in model.modules():
            if isinstance(module, ProductKeyMemory):
                _let_read_whole_sequences(module, group(mesh, axes), ranks)
    tokens = group(mesh, DATA if same_reads else (*DATA, "tensor"))
    for module in model.modules():
        if isinstance(module, QueryNorm):
            module.reduce = lambda x: differentiable_sum(x, tokens)
    # A shared table stands in `state_dict()` under the name of every reader.
    for name, table in model.named_modules(remove_duplicate=False):
        if isinstance(table, ShardedTable):
            placement[f"{name}.weight"] = ShardSpec(
                table.spec_dim, axes, (table.slots, table.dim)[table.spec_dim]
            )
    return placement


def losses_on(
    mesh: DeviceMesh | None, share: Share = "heads"
) -> Callable[[Tensor, Tensor], Tensor]:
    """`token_losses` of what a model on this mesh returns. share: as for `apply`."""
    if mesh is None or tensor_size(mesh) == 1:
        return token_losses
    if share == "sequence":
        return partial(piece_losses, ranks=group(mesh, ("tensor",)))
    from memshard.parallel.tensor import token_losses as split_token_losses

    return split_token_losses


def _let_read_whole_sequences(
    memory: ProductKeyMemory, ranks: dist.ProcessGroup, count: int
) -> None:
    """Give a memory all tokens of the sequence, and keep this rank's piece of what it reads.

    Every rank then finds the whole gradient of the memory's dense parameters; taking 1 / ranks of
    it makes that a part, like those of other layers, so that copies cannot drift apart. The tables,
    whose columns only one rank has, undo it.
    """

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, padding, *replay = inputs
        return gather(x, ranks), None if padding is None else gathered(padding, ranks), *replay

    memory.register_forward_pre_hook(before)
    memory.register_forward_hook(lambda _, inputs, y: split(y, ranks, 1 / count))
