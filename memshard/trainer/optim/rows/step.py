"""One step of a table's optimizer: its numbers, and the factors they give each row."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from memshard.models.kernels.plain_rows import AdamUpdate
from memshard.models.memory.row_gradient import SortedReads
from memshard.models.memory.table import ValueTable
from memshard.models.random import fold

_ROUNDING_STREAM = 0x524F554E44


@dataclass(frozen=True)
class Step:
    """The numbers of one step of a table; `number` counts from 1."""

    semantics: str
    number: int
    lr: float
    beta1: float
    beta2: float
    eps: float

    def update(self, table: ValueTable, state: dict[str, Any], reads: SortedReads) -> AdamUpdate:
        """Return the step on the rows of `reads`, ready for `table.backend.adam_rows`.

        With row-step semantics it counts the step of these rows in `state`.
        """
        factors = self.factors(state, reads.rows)
        return AdamUpdate(
            values=table.weight,
            exp_avg=state["exp_avg"],
            exp_avg_sq=state["exp_avg_sq"],
            master=state.get("master"),
            rows=reads.rows,
            starts=reads.starts,
            bags=reads.bags,
            weights=reads.weights,
            upstream=reads.upstream,
            step_sizes=factors.step_sizes,
            decay1=factors.decay1,
            decay2=factors.decay2,
            step_size=factors.step_size,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=factors.eps,
            first_row=table.first_row,
            first_column=table.local_columns.start,
            key=fold(_ROUNDING_STREAM, self.number),
        )

    def factors(self, state: dict[str, Any], rows: Tensor) -> "Factors":
        """Return step size, eps and decays by the semantics, for `rows` [n]."""
        root = (1 - self.beta2**self.number) ** 0.5
        size = self.lr * root / (1 - self.beta1**self.number)
        # torch.optim.Adam adds eps after the correction of the second moment, SparseAdam before.
        eps = self.eps * root if self.semantics in ("dense", "catch-up") else self.eps
        dtype = state["exp_avg"].dtype
        if self.semantics == "row-step":
            state["row_step"][rows] += 1
            # fp64: 1 - 0.999^1 in fp32 would be right to four digits only.
            numbers = state["row_step"][rows].double()
            sizes = self.lr * (1 - self.beta2**numbers).sqrt() / (1 - self.beta1**numbers)
            return Factors(size, eps, step_sizes=sizes.to(dtype))
        if self.semantics == "catch-up":
            # Steps that did not read the row: read in step 3 and now in step 7, it has missed 4, 5
            # and 6.
            missed = self.number - 1 - state["last_step"][rows].double()
            decay1, decay2 = (self.beta1**missed).to(dtype), (self.beta2**missed).to(dtype)
            return Factors(size, eps, decay1=decay1, decay2=decay2)
        return Factors(size, eps)


@dataclass(frozen=True)
class Factors:
    """Step size and eps of all rows, and what differs from row to row, [n] each.

    step_sizes replaces the common step size; decay1 and decay2 multiply the moments before the
    step. None where nothing differs.
    """

    step_size: float
    eps: float
    step_sizes: Tensor | None = None
    decay1: Tensor | None = None
    decay2: Tensor | None = None
