"""Gather full tables into state dicts, and load them into shards, for user scripts.

The trainer's checkpoints do not need it: their ranks write and read only what they store.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from memshard.models.memory.table import find_tables
from memshard.parallel.tables.sharded import ShardedTable, shard_range

State = dict[str, Any]


def full_state_dict(model: nn.Module, optimizer: Optimizer) -> tuple[State, State] | None:
    """Return `state_dict()` of both with whole tables, as one process without shards has them.

    They are returned on the first rank of the tables' group, None on the others; all ranks must
    call it. model: not wrapped (`ddp.module`); optimizer: one that contains the tables' RowAdam.
    TypeError for what is no model or optimizer, ValueError for an optimizer of other tables.
    """
    _numbers(model, optimizer)  # before what is none of them fails in Python's words
    model_state, optimizer_state = model.state_dict(), _copy(optimizer.state_dict())
    first = True
    for table, holder, key in _parts(model, optimizer, model_state, optimizer_state):
        part = holder[key]
        holder[key] = _join(table, part.to_local() if isinstance(part, DTensor) else part)
        first = dist.get_rank(table.group) == 0
    return (model_state, optimizer_state) if first else None


def load_full_state_dict(
    model: nn.Module, optimizer: Optimizer, model_state: State, optimizer_state: State
) -> None:
    """Load what `full_state_dict` or one process has saved; every rank takes its shards.

    TypeError for what is no model or optimizer, ValueError for an optimizer of other tables.
    """
    _numbers(model, optimizer)  # refuses an optimizer of other tables
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)


def _copy(optimizer_state: State) -> State:
    """Return the same tensors in new dicts: `Optimizer.state_dict()` returns the live ones."""
    return {
        **optimizer_state,
        "state": {number: dict(entry) for number, entry in optimizer_state["state"].items()},
    }


def _parts(
    model: nn.Module, optimizer: Optimizer, model_state: State, optimizer_state: State
) -> Iterator[tuple[ShardedTable, State, Any]]:
    """Yield (table, dict, key) for every entry that the ranks split."""
    for table, number in _numbers(model, optimizer).items():
        entry = optimizer_state["state"][number]
        # Where ranks split columns, every rank has the states with one number for each row.
        yield from (
            (table, entry, key)
            for key, value in entry.items()
            if isinstance(value, Tensor) and value.ndim > table.spec_dim
        )
    # A table that several layers share has a key for each of them.
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ShardedTable):
            yield module, model_state, f"{name}.weight"


def _numbers(model: nn.Module, optimizer: Optimizer) -> dict[ShardedTable, int]:
    """Return each split table's number in the optimizer's state. ValueError if it has none."""
    names = dict(find_tables(model))
    # Not by its class: trainers wrap optimizers.
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"an optimizer is one of torch's, such as CombinedOptimizer, not "
            f"{type(optimizer).__name__}"
        )
    shown = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {id(parameter): number for number, parameter in enumerate(shown)}
    tables = {}
    for name, table in names.items():
        if isinstance(table, ShardedTable):
            if id(table.anchor) not in numbers:
                raise ValueError(
                    f"the optimizer does not hold the table {name}: pass the CombinedOptimizer "
                    "that was made of this very model's tables; a copy's are others"
                )
            tables[table] = numbers[id(table.anchor)]
    return tables


def _slice(table: ShardedTable, whole: Tensor, rank: int) -> Tensor:
    """Return a rank's shard of a whole table."""
    part = shard_range(whole.shape[table.spec_dim], table.group, rank)
    return whole.narrow(table.spec_dim, part.start, len(part))


def _join(table: ShardedTable, part: Tensor) -> Tensor:
    """Return the whole table on the group's first rank, and `part` itself on the others.

    The first rank receives the parts one after another.
    """
    if dist.get_rank(table.group) > 0:
        dist.send(part.contiguous(), group=table.group, group_dst=0)
        return part
    shape = list(part.shape)
    shape[table.spec_dim] = (table.slots, table.dim)[table.spec_dim]
    whole = part.new_empty(shape)
    _slice(table, whole, 0).copy_(part)
    # One at a time: of the other ranks' parts, one is in memory.
    for rank in range(1, table.ranks):
        theirs = _slice(table, whole, rank)
        received = torch.empty_like(theirs, memory_format=torch.contiguous_format)
        dist.recv(received, group=table.group, group_src=rank)
        theirs.copy_(received)
    return whole
