"""Give the state of split tables the whole tables' shapes in an optimizer's `state_dict()`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memshard.models.memory.table import ValueTable

State = dict[str, Any]


def as_whole(optimizer: Optimizer, tables: Iterable[ValueTable], state: State) -> State:
    """Return `optimizer.state_dict()` with the states of tables as `ValueTable.as_whole` does.

    Numbers of steps become tensors, as in torch's optimizers: torch.distributed.checkpoint puts a
    loaded number beside the entry of a state that has integers for keys, and fills a tensor.
    """

    def whole(table: ValueTable, value: Any) -> Tensor:
        return table.as_whole(value) if isinstance(value, Tensor) else torch.tensor(value)

    return _changed(optimizer, tables, state, whole)


def parts_of(optimizer: Optimizer, tables: Iterable[ValueTable], state: State) -> State:
    """Return a state to load, with this rank's parts of the tables' states. ValueError where
    `ValueTable.part_of` has one.
    """

    def part(table: ValueTable, value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim:
            return table.part_of(value)
        return int(value)

    return _changed(optimizer, tables, state, part)


def _changed(
    optimizer: Optimizer,
    tables: Iterable[ValueTable],
    state: State,
    change: Callable[[ValueTable, Any], Any],
) -> State:
    by_anchor = {id(table.anchor): table for table in tables}
    entries = dict(state["state"])
    # Where the groups differ, torch's own check says so.
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
        for parameter, number in zip(group["params"], saved["params"], strict=False):
            table = by_anchor.get(id(parameter))
            if table is not None and number in entries:
                entries[number] = {
                    key: change(table, value) for key, value in entries[number].items()
                }
    return {**state, "state": entries}
