"""Row-sparse Adam for externalised value tables; works with or without the trainer."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from memshard.models.memory.table import ANCHOR_UNIT, ValueTable

_BLOCK_ROWS = 1024
"""Rows updated at a time: temporaries then stay in cache (2 to 3 times faster than all at once)."""


class RowAdam(Optimizer):
    """Adam on the rows that were read since the last step; the other rows and their moments do not move.

    The semantics of torch.optim.SparseAdam (`lazy`): one step count for bias correction, no weight decay. Moments are
    fp32 at least, as large as the table. Gradients of all micro-batches and of all layers that share a table are summed
    before the one update.

    In `param_groups` a table is represented by its scalar `anchor`: GradScaler's unscaling and inf check, and clipping by
    the norm of all groups, act on the anchor's gradient, and `step` scales the row gradients accordingly. The anchor adds
    nothing to that norm. `zero_grad` forgets collected reads.
    """

    def __init__(
        self, tables: Iterable[ValueTable], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        self.tables = list(tables)
        for table in self.tables:
            if not table.hidden:
                raise ValueError("RowAdam needs externalised tables: pass it what externalize_tables(model) returns")
        self.touched = [(0, 0) for _ in self.tables]
        """Of every table in the last step: reads that this rank's tokens asked for, and rows updated here."""
        super().__init__([table.anchor for table in self.tables], {"lr": lr, "betas": betas, "eps": eps})
        for table in self.tables:
            moments_dtype = torch.promote_types(table.weight.dtype, torch.float32)
            self.state[table.anchor] = {
                "step": 0,
                "exp_avg": torch.zeros_like(table.weight, dtype=moments_dtype),
                "exp_avg_sq": torch.zeros_like(table.weight, dtype=moments_dtype),
            }

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the rows that were read, then forget the reads."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = {id(anchor): group for group in self.param_groups for anchor in group["params"]}
        for index, table in enumerate(self.tables):
            self.touched[index] = _update(table, self.state[table.anchor], group[id(table.anchor)])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the reads collected since the last step."""
        for table in self.tables:
            table.drop_reads()


def _update(table: ValueTable, state: dict[str, Any], group: dict[str, Any]) -> tuple[int, int]:
    """One Adam step on the rows of `table.reads`; returns the number of reads and of distinct rows."""
    if not table.reads:
        return 0, 0
    assert table.anchor.grad is not None
    # What scaled the dense gradients since the backward passes (a loss scaler, clipping) has scaled the anchor's with them.
    scale = float(table.anchor.grad) / (len(table.reads) * ANCHOR_UNIT) * table.gradient_scale
    reads = table.reads_asked
    beta1, beta2 = group["betas"]
    state["step"] += 1
    correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
    step_size = group["lr"] * correction2**0.5 / correction1
    distinct = 0
    for rows, gradient in _blocks(table, scale):
        exp_avg = state["exp_avg"].index_select(0, rows).lerp_(gradient, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, exp_avg)
        state["exp_avg_sq"].index_copy_(0, rows, exp_avg_sq)
        change = exp_avg.div_(exp_avg_sq.sqrt_().add_(group["eps"])).mul_(-step_size)
        table.weight.index_add_(0, rows, change.to(table.weight.dtype))
        distinct += len(rows)
    table.drop_reads()
    return reads, distinct


def _blocks(table: ValueTable, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    for part in table.gradients(scale):
        for first in range(0, len(part.rows), _BLOCK_ROWS):
            last = min(first + _BLOCK_ROWS, len(part.rows))
            yield part.rows[first:last], part.sums(first, last)
