"""States of a model and its optimizer with whole tables, from and to ranks that hold parts: for
scripts of one's own.

The trainer's checkpoints need none of this: their ranks write and read only what they hold.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from memshard.models.memory.table import find_tables
from memshard.parallel.tables.sharded import ShardedTable, shard_range

State = dict[str, Any]


def full_state_dict(model: nn.Module, optimizer: Optimizer) -> tuple[State, State] | None:
    """`state_dict()` of both, as one process has them that holds all tables: on the first rank of
    the tables' group, None on the others.

    All ranks must call it. model: not wrapped (`ddp.module`); optimizer: one that holds the tables'
    RowAdam.
    """
    model_state, optimizer_state = model.state_dict(), _copy(optimizer.state_dict())
    first = True
    for table, holder, key in _parts(model, optimizer, model_state, optimizer_state):
        holder[key] = _join(table, holder[key])
        first = dist.get_rank(table.group) == 0
    return (model_state, optimizer_state) if first else None


def load_full_state_dict(
    model: nn.Module, optimizer: Optimizer, model_state: State, optimizer_state: State
) -> None:
    """Load what `full_state_dict` or one process has saved; every rank takes its parts of the
    tables.
    """
    model_state, optimizer_state = dict(model_state), _copy(optimizer_state)
    for table, holder, key in _parts(model, optimizer, model_state, optimizer_state):
        holder[key] = _slice(table, holder[key], dist.get_rank(table.group)).clone(
            memory_format=torch.contiguous_format
        )
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)


def _copy(optimizer_state: State) -> State:
    """The same tensors in dicts of their own: `Optimizer.state_dict()` hands out the live ones."""
    return {
        **optimizer_state,
        "state": {number: dict(entry) for number, entry in optimizer_state["state"].items()},
    }


def _parts(
    model: nn.Module, optimizer: Optimizer, model_state: State, optimizer_state: State
) -> Iterator[tuple[ShardedTable, State, Any]]:
    """(table, dict, key) of every entry that the ranks split."""
    shown = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {id(parameter): number for number, parameter in enumerate(shown)}
    for _, table in find_tables(model):
        if isinstance(table, ShardedTable):
            entry = optimizer_state["state"][numbers[id(table.anchor)]]
            # A number a row is on every rank where the ranks split columns.
            yield from (
                (table, entry, key)
                for key, value in entry.items()
                if isinstance(value, Tensor) and value.ndim > table.spec_dim
            )
    # A table that several layers share has a key for each of them.
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ShardedTable):
            yield module, model_state, f"{name}.weight"


def _slice(table: ShardedTable, whole: Tensor, rank: int) -> Tensor:
    """A rank's part of a whole table."""
    part = shard_range(whole.shape[table.spec_dim], table.group, rank)
    return whole.narrow(table.spec_dim, part.start, len(part))


def _join(table: ShardedTable, part: Tensor) -> Tensor:
    """The whole on the group's first rank, which receives the parts one after another; the part
    itself on the others.
    """
    if dist.get_rank(table.group) > 0:
        dist.send(part.contiguous(), group=table.group, group_dst=0)
        return part
    shape = list(part.shape)
    shape[table.spec_dim] = (table.slots, table.dim)[table.spec_dim]
    whole = part.new_empty(shape)
    _slice(table, whole, 0).copy_(part)
    for rank in range(1, table.ranks):
        theirs = _slice(table, whole, rank)
        received = torch.empty_like(theirs, memory_format=torch.contiguous_format)
        dist.recv(received, group=table.group, group_src=rank)
        theirs.copy_(received)
    return whole
