"""One Adam step on some rows of a table, in plain torch: what every faster path must equal."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memshard.models.memory.row_gradient import SortedReads
from memshard.models.memory.table import ValueTable
from memshard.models.random import fold, fold_tensor, random_bits

_ROUNDING_STREAM = 0x524F554E44


@dataclass(frozen=True)
class Step:
    """The numbers of one step, `number` counted from 1."""

    semantics: str
    number: int
    lr: float
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class Factors:
    """step_size, eps: of all rows. by_row: what differs from row to row, [rows] each: `step_size`
    in place of the common one, and `decay1`, `decay2` of the moments before the step.
    """

    step_size: float
    eps: float
    by_row: dict[str, Tensor]


def factors(step: Step, state: dict[str, Any], rows: Tensor) -> Factors:
    """The factors of the given rows, whose step is counted."""
    root = (1 - step.beta2**step.number) ** 0.5
    size = step.lr * root / (1 - step.beta1**step.number)
    # torch.optim.Adam adds eps after the correction of the second moment, SparseAdam before.
    eps = step.eps * root if step.semantics in ("dense", "catch-up") else step.eps
    by_row = {}
    if step.semantics == "row-step":
        state["row_step"][rows] += 1
        numbers = state["row_step"][rows].double()
        by_row["step_size"] = step.lr * (1 - step.beta2**numbers).sqrt() / (1 - step.beta1**numbers)
    if step.semantics == "catch-up":
        missed = step.number - 1 - state["last_step"][rows].double()
        by_row |= {"decay1": step.beta1**missed, "decay2": step.beta2**missed}
    return Factors(
        size, eps, {name: value.to(state["exp_avg"].dtype) for name, value in by_row.items()}
    )


def blocks(part: SortedReads) -> Iterator[tuple[int, int]]:
    """Where to cut a part's rows: on a CPU temporaries then stay in cache (2 to 3 times faster than
    all at once); on a GPU, where each block is several launches, they are bounded (64 MB each).
    """
    rows = max(1024, (1 << 24) // max(1, part.upstream.shape[1])) if part.upstream.is_cuda else 1024
    for first in range(0, len(part.rows), rows):
        yield first, min(first + rows, len(part.rows))


def update_rows(
    table: ValueTable, state: dict[str, Any], step: Step, part: SortedReads, found: Factors
) -> None:
    """One Adam step on part.rows: pick rows, update them, put them back, block by block. The others
    keep their bits.
    """
    for first, last in blocks(part):
        own = Factors(
            found.step_size,
            found.eps,
            {name: value[first:last] for name, value in found.by_row.items()},
        )
        rows = part.rows[first:last]
        old = {name: tensor.index_select(0, rows) for name, tensor in _tensors(table, state)}
        _adam(table, rows, old, part.sums(first, last), step, own)
        for name, tensor in _tensors(table, state):
            tensor.index_copy_(0, rows, old[name])


def _tensors(table: ValueTable, state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    yield "values", table.weight
    for name in ("exp_avg", "exp_avg_sq", "master"):
        if name in state:
            yield name, state[name]


def _adam(
    table: ValueTable,
    rows: Tensor,
    old: dict[str, Tensor],
    gradient: Tensor,
    step: Step,
    own: Factors,
) -> None:
    """Bring values and moments up to date, in place: fresh memory for each result would cost more
    than the arithmetic.

    old: [rows, dim] each; gradient: [rows, dim].
    """
    exp_avg, exp_avg_sq, values = old["exp_avg"], old["exp_avg_sq"], old["values"]
    if "decay1" in own.by_row:
        exp_avg.mul_(own.by_row["decay1"][:, None])
        exp_avg_sq.mul_(own.by_row["decay2"][:, None])
    exp_avg.lerp_(gradient, 1 - step.beta1)
    exp_avg_sq.mul_(step.beta2).addcmul_(gradient, gradient, value=1 - step.beta2)
    size = own.by_row["step_size"][:, None] if "step_size" in own.by_row else own.step_size
    change = torch.sqrt(exp_avg_sq, out=gradient).add_(own.eps)
    torch.div(exp_avg, change, out=change).mul_(size)
    if "master" in old:
        values.copy_(old["master"].sub_(change))
    elif values.dtype == exp_avg.dtype:
        values.sub_(change)
    else:
        exact = values.to(exp_avg.dtype).sub_(change)
        values.copy_(round_stochastically(exact, _random(table, step, rows), values.dtype))


def rounding_key(step: Step) -> int:
    """What the random bits of a step's rounding depend on, besides row and column."""
    return fold(_ROUNDING_STREAM, step.number)


def _random(table: ValueTable, step: Step, rows: Tensor) -> Tensor:
    """32 random bits for each value, the same in every layout."""
    keys = fold_tensor(rounding_key(step), rows + table.first_row)
    counters = torch.arange(
        table.local_columns.start, table.local_columns.stop, device=rows.device, dtype=torch.int32
    )
    return random_bits(keys[:, None], counters)


def round_stochastically(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """x [fp32] in fp16 or bf16, rounded up or down with probabilities that make its mean x. bits:
    int32, 32 random bits each.
    """
    mantissa, smallest = (10, -14) if dtype == torch.float16 else (7, -112)
    exponent = (x.view(torch.int32) & 0x7F800000).clamp(min=(127 + smallest) << 23)
    # The distance of neighbouring values of `dtype` around x, and its inverse: powers of two, so
    # scaling is exact.
    quantum = (exponent - (mantissa << 23)).view(torch.float32)
    inverse = ((254 << 23) - (exponent - (mantissa << 23))).view(torch.float32)
    uniform = (bits >> 8 & 0xFFFFFF).float() * 2.0**-24
    return ((x * inverse + uniform).floor() * quantum).to(dtype)
