"""A dense optimizer of any kind: built, given its states, and shared out over ranks."""

from collections.abc import Iterable, Sequence
from importlib import import_module

import torch
from torch import Tensor
from torch.optim import Optimizer

from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.optim.dense.kinds import DENSE_KINDS, DenseKind


def build_dense_optimizer(parameters: Sequence[Tensor], config: OptimizerConfig) -> Optimizer:
    """Return the recipe's optimizer over the parameters, possibly none; vectors (norms, biases) are
    not decayed.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    module, _, function = DENSE_KINDS[config.kind].build.partition(":")
    # torch refuses an empty list of groups, but not groups without parameters: a ZeRO rank
    # may own none.
    optimizer: Optimizer = getattr(import_module(module), function)(filled or groups, config)
    return optimizer


def make_states(optimizer: Optimizer, kind: DenseKind, tensors: Iterable[Tensor]) -> None:
    """Give the optimizer the states that its first step would make, so that a checkpoint can be
    loaded into them.
    """
    for tensor in tensors:
        moments = kind.moments(tuple(tensor.shape))
        optimizer.state[tensor] = {
            name: torch.zeros((), dtype=torch.float32, device=tensor.device) for name in kind.counts
        } | {name: tensor.new_zeros(shape) for name, shape in moments.items()}


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Return which rank keeps the optimizer state of each parameter: the largest first, each to the
    rank that has least.
    """
    loads = [0] * ranks
    owner_of = [0] * len(sizes)
    # Largest first to the least loaded is at most 4/3 of the best balance (Graham 1969).
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owner_of[number] = loads.index(min(loads))
        loads[owner_of[number]] += sizes[number]
    return owner_of
