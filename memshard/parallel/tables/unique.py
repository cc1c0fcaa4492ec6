"""A value table split by rows whose readers fetch each row they need once."""

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
        # Ascending, so each owner's rows are contiguous.
        distinct, inverse = torch.unique(rows.flatten(), return_inverse=True)
        ours = torch.bincount(self._owner(distinct), minlength=self.ranks).tolist()
        theirs = share_counts(ours, self.group, rows.device)
        wanted = exchange(self._wire(distinct), ours, theirs, self.group, self.traffic) - self.first_row
        weights = weights.flatten().to(torch.promote_types(weights.dtype, self.weight.dtype))
        if self.observer is not None:
            sums = torch.zeros(len(distinct), 2, dtype=torch.float64, device=rows.device)
            sums.index_add_(0, inverse, torch.stack((weights.detach().double(), torch.ones_like(weights, dtype=torch.float64)), dim=1))
            seen = exchange(sums, ours, theirs, self.group)
            self.observer.observe(wanted, seen[:, 0], seen[:, 1])
        return _UniqueRead.apply(weights, self.anchor, self, wanted, inverse.to(torch.int32), bag_offsets(rows), ours, theirs)


class _UniqueRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, anchor, table, wanted, inverse, offsets, ours, theirs):  # type: ignore[no-untyped-def]
        fetched = exchange(table.weight.index_select(0, wanted), theirs, ours, table.group, table.traffic)
        ctx.table, ctx.ours, ctx.theirs = table, ours, theirs
        ctx.save_for_backward(fetched, weights, wanted, inverse, offsets)
        return gather_sum(fetched, inverse, weights, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        fetched, weights, wanted, inverse, offsets = ctx.saved_tensors
        table, upstream = ctx.table, upstream.contiguous()
        # Every fetched row has been read, so row i of the merged reads is fetched[i].
        merged = sort_reads([Read(inverse, weights, offsets, upstream)])
        sums = upstream.new_zeros(0, fetched.shape[1]) if merged is None else merged.sums(0, len(fetched))
        received = exchange(sums.to(weights.dtype), ctx.ours, ctx.theirs, table.group, table.traffic)
        numbers = torch.arange(len(wanted), device=wanted.device)
        anchor = table.collect(Read(wanted, received.new_ones(len(wanted)), numbers, received))
        scores = score_gradients(fetched, inverse, offsets, upstream) if ctx.needs_input_grad[0] else None
        return scores, anchor, None, None, None, None, None, None
