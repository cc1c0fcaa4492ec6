"""Several optimizers behind one, for trainers and schedulers that know a single one."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim import Optimizer


class CombinedOptimizer(Optimizer):
    """Step several optimizers, which must not share parameters, as one.

    `param_groups` and `state` are theirs, in order, so learning-rate schedulers, GradScaler,
    Lightning and Hugging Face's Trainer see one ordinary optimizer, with an ordinary `state_dict`.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers: tuple[Optimizer, ...] = ()
        # Keys that all groups have: schedulers that cycle momentum look here for betas.
        shared = set.intersection(*(set(optimizer.defaults) for optimizer in optimizers))
        defaults = {key: value for key, value in optimizers[0].defaults.items() if key in shared}
        super().__init__(
            [group for optimizer in optimizers for group in optimizer.param_groups], defaults
        )
        for optimizer in optimizers:
            # Optimizer.__init__ starts with no state, and RowAdam has its moments from the start.
            self.state.update(optimizer.state)
        self.optimizers = optimizers
        self._share()

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
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all optimizers."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of all optimizers."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Give every optimizer its share of the common groups, and the common state."""
        first = 0
        for optimizer in self.optimizers:
            count = len(optimizer.param_groups)
            # The same dicts, so a scheduler that changes a learning rate here changes it there.
            optimizer.param_groups = self.param_groups[first : first + count]
            optimizer.state = self.state
            first += count
