"""Several optimizers behind one, for trainers and schedulers that know a single one."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch.optim import LBFGS, Optimizer

from memshard.models.memory.table import ValueTable
from memshard.trainer.optim.rows.adam import RowAdam
from memshard.trainer.optim.rows.state_dict import as_whole, parts_of


class CombinedOptimizer(Optimizer):
    """Step several optimizers, which must not share parameters, as one.

    `param_groups` and `state` are theirs, in order, so learning-rate schedulers, GradScaler,
    Lightning and Hugging Face's Trainer see one ordinary optimizer, with an ordinary `state_dict`.
    TypeError for what is no optimizer, ValueError for none and for LBFGS.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers: tuple[Optimizer, ...] = ()
        optimizers = tuple(_members(optimizers))
        if not optimizers:
            raise ValueError("no optimizers: CombinedOptimizer(AdamW(...), RowAdam(tables))")
        # Keys that all groups have: schedulers that cycle momentum look here for betas.
        shared = set.intersection(*(set(optimizer.defaults) for optimizer in optimizers))
        defaults = {key: value for key, value in optimizers[0].defaults.items() if key in shared}
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        if any("param_names" in group for group in groups):
            # torch wants names in all groups or in none; tables have none of their own.
            for number, group in enumerate(groups):
                count = len(group["params"])
                group.setdefault("param_names", [f"group {number}.{i}" for i in range(count)])
        super().__init__(groups, defaults)
        self.optimizers = optimizers
        # Optimizer.__init__ starts with no state, and RowAdam has its moments from the start.
        self._gather()
        self._watch()

    def __getstate__(self) -> dict[str, Any]:
        # torch's leaves out what a subclass adds.
        return super().__getstate__() | {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "optimizers" in state:
            self._watch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ValueError: a new group would belong to none of the optimizers."""
        if self.optimizers:
            raise ValueError(
                "a CombinedOptimizer takes no more groups: add the group to one of its optimizers "
                "before combining them"
            )
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step each optimizer once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                # Here, once; each optimizer would run the model again.
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        self._gather()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all optimizers."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all optimizers, those of tables as `RowAdam` does."""
        self._gather()
        return as_whole(self, self._tables(), super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of all optimizers, those of tables as `RowAdam` does."""
        super().load_state_dict(parts_of(self, self._tables(), state_dict))
        first = 0
        for optimizer in self.optimizers:
            count = len(optimizer.param_groups)
            # The same dicts, so a scheduler that changes a learning rate here changes it there.
            optimizer.param_groups = self.param_groups[first : first + count]
            shown = (weight for group in optimizer.param_groups for weight in group["params"])
            optimizer.state.clear()
            optimizer.state.update(
                {weight: self.state[weight] for weight in shown if weight in self.state}
            )
            first += count

    def _tables(self) -> list[ValueTable]:
        rows = [optimizer for optimizer in self.optimizers if isinstance(optimizer, RowAdam)]
        return [table for optimizer in rows for table in optimizer.tables]

    def _gather(self) -> None:
        """Show the groups and states of all optimizers as this one's."""
        self.param_groups[:] = [
            group for optimizer in self.optimizers for group in optimizer.param_groups
        ]
        for optimizer in self.optimizers:
            self.state.update(optimizer.state)

    def _watch(self) -> None:
        """Gather again when one of the optimizers has loaded a state by itself, and tell tables
        what is trained with them.
        """
        dense = [
            weight
            for optimizer in self.optimizers
            if not isinstance(optimizer, RowAdam)
            for group in optimizer.param_groups
            for weight in group["params"]
        ]
        for table in self._tables():
            table.trained_beside = dense
        for optimizer in self.optimizers:
            optimizer.register_load_state_dict_post_hook(lambda _: self._gather())


def _members(optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    """Yield the optimizers, those of a CombinedOptimizer in its place."""
    for optimizer in optimizers:
        if isinstance(optimizer, CombinedOptimizer):
            yield from optimizer.optimizers
        elif isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS runs the model several times a step, which CombinedOptimizer does not: step "
                "it by itself"
            )
        elif isinstance(optimizer, Optimizer):
            yield optimizer
        else:
            raise TypeError(
                f"CombinedOptimizer takes optimizers, not {type(optimizer).__name__}: "
                "CombinedOptimizer(AdamW(...), RowAdam(tables))"
            )
