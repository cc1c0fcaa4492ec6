"""A value table split by rows whose readers fetch each row they need once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memshard.models.memory.bags import gather_sum, score_gradients
from memshard.models.memory.row_gradient import Read, sort_reads
from memshard.models.memory.table import bag_offsets
from memshard.parallel.collectives import exchange, share_counts
from memshard.parallel.tables.rows import RowShardedTable


class UniqueRowTable(RowShardedTable):
    """Rows split as in `RowShardedTable`; the owner sends the distinct rows that a rank reads, and gets their summed gradients back.

    (P - 1) / P * reads / duplicates * (d (v + b) + i) bytes a token (d values of v bytes a row and b = 4 a gradient, ids of
    i = 4 bytes, P ranks, each row read `duplicates` times by the rank): independent of P, cheap where reads repeat. The
    fetched rows are kept for backward.
    """

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """As `ValueTable.weighted_sum`, with row numbers of the whole table. Each rank passes its own tokens."""
        self._count(rows)
        fetch = self._plan(rows, weights.detach())
        weights = weights.flatten().to(torch.promote_types(weights.dtype, self.weight.dtype))
        return _Sum.apply(weights, self.anchor, self, fetch)

    def dot(self, rows: Tensor, x: Tensor) -> Tensor:
        """As `ValueTable.dot`, of the fetched rows; the same bytes as for `weighted_sum`."""
        self._count(rows)
        fetch = self._plan(rows, torch.ones_like(rows, dtype=x.dtype))
        return _Dot.apply(x.to(torch.promote_types(x.dtype, self.weight.dtype)), self.anchor, self, fetch).view(rows.shape)

    def _plan(self, rows: Tensor, weights: Tensor) -> "_Fetch":
        """Tell the owners which rows this rank wants."""
        # Ascending, so each owner's rows are contiguous.
        distinct, inverse = torch.unique(rows.flatten(), return_inverse=True)
        ours = torch.bincount(self._owner(distinct), minlength=self.ranks).tolist()
        theirs = share_counts(ours, self.group, rows.device)
        wanted = exchange(self._wire(distinct), ours, theirs, self.group, self.traffic) - self.first_row
        if self.observer is not None:
            flat = weights.flatten().double()
            sums = torch.zeros(len(distinct), 2, dtype=torch.float64, device=rows.device)
            sums.index_add_(0, inverse, torch.stack((flat, torch.ones_like(flat)), dim=1))
            seen = exchange(sums, ours, theirs, self.group)
            self.observer.observe(wanted, seen[:, 0], seen[:, 1])
        return _Fetch(wanted, inverse.to(torch.int32), bag_offsets(rows), ours, theirs)

    def fetch(self, plan: "_Fetch") -> Tensor:
        """The wanted rows, [distinct, dim]."""
        return exchange(self.weight.index_select(0, plan.wanted), plan.theirs, plan.ours, self.group, self.traffic)

    def give_back(self, plan: "_Fetch", weights: Tensor, upstream: Tensor) -> None:
        """Send the fetched rows' gradients, sums of weights and upstream vectors, to the owners."""
        # Every fetched row has been read, so row i of the merged reads is the i-th fetched.
        merged = sort_reads([Read(plan.inverse, weights, plan.offsets, upstream)])
        sums = upstream.new_zeros(0, self.dim) if merged is None else merged.sums(0, len(merged.rows))
        received = exchange(sums.to(weights.dtype), plan.ours, plan.theirs, self.group, self.traffic)
        numbers = torch.arange(len(plan.wanted), device=received.device)
        self.collect(Read(plan.wanted, received.new_ones(len(numbers)), numbers, received))


@dataclass(frozen=True)
class _Fetch:
    """wanted: rows of this rank that the others asked for; inverse: [reads] int32, which fetched row each read is; offsets: of bags;
    ours, theirs: rows from and to each rank.
    """

    wanted: Tensor
    inverse: Tensor
    offsets: Tensor
    ours: list[int]
    theirs: list[int]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, anchor, table, plan):  # type: ignore[no-untyped-def]
        fetched = table.fetch(plan)
        ctx.table, ctx.plan = table, plan
        ctx.save_for_backward(fetched, weights)
        return gather_sum(fetched, plan.inverse, weights, plan.offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        fetched, weights = ctx.saved_tensors
        upstream = upstream.contiguous()
        ctx.table.give_back(ctx.plan, weights, upstream)
        scores = score_gradients(fetched, ctx.plan.inverse, ctx.plan.offsets, upstream) if ctx.needs_input_grad[0] else None
        return scores, None, None, None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, table, plan):  # type: ignore[no-untyped-def]
        fetched = table.fetch(plan)
        ctx.table, ctx.plan = table, plan
        ctx.save_for_backward(fetched, x)
        return score_gradients(fetched, plan.inverse, plan.offsets, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        fetched, x = ctx.saved_tensors
        upstream = upstream.contiguous()
        ctx.table.give_back(ctx.plan, upstream, x.contiguous())
        to_x = gather_sum(fetched, ctx.plan.inverse, upstream, ctx.plan.offsets) if ctx.needs_input_grad[0] else None
        return to_x, None, None, None
