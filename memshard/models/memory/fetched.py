"""Reads of rows that lie elsewhere: each distinct row is fetched once, and its summed gradient is
given back.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memshard.models.memory.bags import gather_sum, score_gradients
from memshard.models.memory.row_gradient import Read, sort_reads

if TYPE_CHECKING:
    from memshard.models.memory.table import ValueTable


@dataclass(frozen=True)
class Fetch:
    """wanted: rows that the table holds here; inverse: [reads] int32, which fetched row each read
    is, all have one; offsets: [bags] int64, where each bag's reads start.
    """

    table: "ValueTable"
    wanted: Tensor
    inverse: Tensor
    offsets: Tensor

    def fetch_rows(self) -> Tensor:
        """The rows, [distinct, dim]."""
        return self.table.rows_at(self.wanted)

    def return_gradients(self, gradients: Tensor) -> None:
        """Hand over the rows' gradients, [distinct, dim] of the weights' dtype."""
        self.table.collect_row_gradients(self.wanted, gradients)


def _summed(fetch: Fetch, weights: Tensor, upstream: Tensor) -> Tensor:
    # Every fetched row has been read, so row i of the merged reads is the i-th fetched.
    merged = sort_reads([Read(fetch.inverse, weights, fetch.offsets, upstream)])
    return (
        upstream.new_zeros(0, upstream.shape[1])
        if merged is None
        else merged.sums(0, len(merged.rows))
    ).to(weights.dtype)


class FetchedSum(torch.autograd.Function):
    """Weighted sums of fetched rows: apply(weights, anchor, fetch); weights: [reads]."""

    @staticmethod
    def forward(ctx, weights, anchor, fetch):  # type: ignore[no-untyped-def]
        fetched = fetch.fetch_rows()
        ctx.fetch = fetch
        ctx.save_for_backward(fetched, weights)
        return gather_sum(fetched, fetch.inverse, weights, fetch.offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (fetched, weights), fetch = ctx.saved_tensors, ctx.fetch
        upstream = upstream.contiguous()
        fetch.return_gradients(_summed(fetch, weights, upstream))
        scores = (
            score_gradients(fetched, fetch.inverse, fetch.offsets, upstream)
            if ctx.needs_input_grad[0]
            else None
        )
        return scores, None, None


class FetchedDot(torch.autograd.Function):
    """Products of fetched rows with each bag's x: apply(x, anchor, fetch); x: [bags, dim]."""

    @staticmethod
    def forward(ctx, x, anchor, fetch):  # type: ignore[no-untyped-def]
        fetched = fetch.fetch_rows()
        ctx.fetch = fetch
        ctx.save_for_backward(fetched, x)
        return score_gradients(fetched, fetch.inverse, fetch.offsets, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (fetched, x), fetch = ctx.saved_tensors, ctx.fetch
        upstream = upstream.contiguous()
        fetch.return_gradients(_summed(fetch, upstream, x.contiguous()))
        to_x = (
            gather_sum(fetched, fetch.inverse, upstream, fetch.offsets)
            if ctx.needs_input_grad[0]
            else None
        )
        return to_x, None, None
