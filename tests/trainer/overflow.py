"""Gradients that overflow on one rank, as they would in backward: before anything is
summed over ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memshard.models.memory.row_gradient import Read
from memshard.models.memory.table import find_tables
from memshard.trainer.run import Run


@contextmanager
def dense_overflow(run: Run) -> Iterator[None]:
    """The last rank's gradient of one matrix is infinite."""
    weight = run.model.blocks[1].mixer.output.weight
    hook = (
        weight.register_hook(lambda gradient: gradient + torch.inf)
        if run.rank == run.ranks - 1
        else None
    )
    yield
    if hook:
        hook.remove()


@contextmanager
def table_overflow(run: Run) -> Iterator[None]:
    """A gradient that the last rank collects for its part of a table is infinite."""
    _, table = next(find_tables(run.model))

    def collect(read: Read) -> Tensor:
        return type(table).collect(table, replace(read, upstream=read.upstream + torch.inf))

    if run.rank == run.ranks - 1:
        table.collect = collect  # type: ignore[method-assign]
    yield
    if run.rank == run.ranks - 1:
        del table.collect


OVERFLOWS: dict[str, Callable[[Run], Any]] = {"dense": dense_overflow, "table": table_overflow}
