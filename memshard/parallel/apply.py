"""Spread a built model over a mesh.

Modules of `models/` know no process groups. Where several ranks compute together, `parallel/` sets
an attribute or a hook that the module leaves open, and this is the whole list:

    QueryNorm.reduce                sums the statistics of queries over all tokens of the step
                                    (`apply`)
    Transformer.share_sequence      cuts this rank's part from tokens and context (`segments.py`,
                                    `tensor.py`)
    Convolutions.neighbours         gives an n-gram memory the rows before this rank's tokens
                                    (`apply`)
    Mixer.share_sequence            gives a mixer the state, and its convolutions the last rows, of
                                    the segment before this rank's (`segments.py`)
    Mixer.heads, .kv_heads          become this rank's number of heads (`tensor.py`)
    Mixer.first_head                number of this rank's first head, which keys what a mixer draws
                                    for each head (`tensor.py`)
    linear maps, embedding, head,   are replaced by this rank's shard of them (`tensor.py`)
    convolutions
    ValueTable                      is replaced by a sharded one (`tables/shard_tables.py`)
    ValueTable.gradient_scale       factor of row gradients (`tables/shard_tables.py`, `apply`)
    pre-forward hooks               gather the sequence: of mixers, feedforwards and shared query
                                    maps (`tensor.py`), of memories that read for a whole tensor
                                    group (`_gather_sequence_for_memory`,
                                    `_gather_sequence_for_ngrams`)
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from memshard.models.loss import token_losses
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.query_norm import QueryNorm
from memshard.models.memory.table import externalize_tables
from memshard.models.ngram.memory import NgramMemory
from memshard.models.transformer import Transformer
from memshard.parallel.collectives import differentiable_sum
from memshard.parallel.mesh import AXES, DATA, group, groups_beside_ddp, tensor_size
from memshard.parallel.segments import RankNeighbours, segment_losses, share_sequences
from memshard.parallel.sequence import gather, gathered, split
from memshard.parallel.spec import ShardSpec
from memshard.parallel.tables.layouts import Layouts, layout_named
from memshard.parallel.tables.shard_tables import shard_tables
from memshard.parallel.tables.sharded import ShardedTable

Share = Literal["heads", "sequence"]


def apply(
    model: nn.Module,
    mesh: DeviceMesh | None,
    layout: Layouts = "rows",
    share: Share = "heads",
) -> dict[str, ShardSpec]:
    """Hide the model's tables and split them, split the dense matrices over the tensor axis, and
    sum query statistics over all tokens.

    layout: how tables are split, a name in `tables.layouts.LAYOUTS`, or one for each kind of table
    that the model has; all or none of them within tensor groups. share: what ranks along the
    tensor axis share: "heads", the large matrices and, between them, the tokens of sequences; or
    "sequence", only the tokens, through the states of fast weights, with whole matrices.

    The losses of the ranks along the data axes must add up to the loss of the batch; along the
    tensor axis each rank has the same loss. Then the gradient of a split tensor is the sum over the
    data axes, that of any other the sum over all ranks (see `grad_norm.py`). Returns the placement
    of every tensor that is split, by its name in `state_dict()`; a tensor that is not listed is
    the same on all ranks. ValueError where sizes do not divide, or fairscale is missing.
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
    names = [layout] if isinstance(layout, str) else list(layout.values())
    rows = [layout_named(name) for name in names or ["rows"]]
    if len({row.axes for row in rows}) > 1:
        raise ValueError(
            f"layouts {' and '.join(names)} split tables along different axes: use one for all"
        )
    row = rows[0]
    if ranks > 1 and not row.within_tensor_group:
        for module in model.modules():
            if isinstance(module, NgramMemory):
                module.convolutions.neighbours = RankNeighbours(group(mesh, ("tensor",)))
    copies = tuple(axis for axis in AXES if axis not in row.axes)
    # Ranks along the tensor axis may read the same.
    sharing, reading = groups_beside_ddp(mesh, row.axes, DATA if row.within_tensor_group else AXES)
    tables = shard_tables(model, sharing, False, layout, replicas=group(mesh, copies))
    if row.within_tensor_group:
        for table in tables:
            table.gradient_scale = ranks  # see _gather_sequence_for_memory
        for module in model.modules():
            if isinstance(module, ProductKeyMemory):
                _gather_sequence_for_memory(module, group(mesh, row.axes), ranks)
            elif isinstance(module, NgramMemory):
                _gather_sequence_for_ngrams(module, group(mesh, row.axes), ranks)
    for module in model.modules():
        if isinstance(module, QueryNorm):
            # The sum's backward sums as well: a query's gradient goes through the statistics of
            # every rank.
            module.reduce = lambda x: differentiable_sum(x, reading)
    # `state_dict()` lists a shared table under the name of every reader.
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ShardedTable):
            dim = module.layout.split_dim
            size = (module.slots, module.dim)[dim]
            placement[f"{name}.weight"] = ShardSpec(dim, module.layout.axes, size)
    return placement


def losses_on(
    mesh: DeviceMesh | None, share: Share = "heads"
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that computes `token_losses` from what a model on this mesh returns.
    share: as for `apply`.
    """
    if mesh is None or tensor_size(mesh) == 1:
        return token_losses
    if share == "sequence":
        return partial(segment_losses, ranks=group(mesh, ("tensor",)))
    from memshard.parallel.tensor import token_losses as split_token_losses

    return split_token_losses


def _gather_sequence_for_memory(
    memory: ProductKeyMemory, group: dist.ProcessGroup, ranks: int
) -> None:
    """Pass a memory all tokens of the sequence, and keep this rank's segment of its output.

    Each rank then computes the full gradient g of the memory's dense parameters, but gradients of
    parameters that are not split are summed over the tensor axis (`complete_gradients`), which
    would give ranks * g. So backward hands every rank 1 / ranks of the output's gradient: the sum
    of g / ranks is g, and copies stay equal to the last bit. A table's columns are on one rank, and
    nobody sums their gradient: gradient_scale = ranks turns its g / ranks back into g.
    """

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, padding, *replay = inputs
        return gather(x, group), None if padding is None else gathered(padding, group), *replay

    memory.register_forward_pre_hook(before)
    memory.register_forward_hook(lambda _, inputs, y: split(y, group, 1 / ranks))


def _gather_sequence_for_ngrams(memory: NgramMemory, group: dist.ProcessGroup, ranks: int) -> None:
    """Do for a memory that is addressed by tokens what `_gather_sequence_for_memory` does."""

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, ctx, *rest = inputs
        facts = {name: getattr(ctx, name) for name in ("documents", "padding", "window")}
        whole = {
            name: None if fact is None else gathered(fact, group) for name, fact in facts.items()
        }
        return gather(x, group), replace(ctx, **whole), *rest

    memory.register_forward_pre_hook(before)
    memory.register_forward_hook(lambda _, inputs, y: (split(y[0], group, 1 / ranks), y[1]))
