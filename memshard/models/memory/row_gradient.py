"""From collected reads to summed gradients of single rows, in bounded blocks and a fixed order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memshard.models.kernels import plain
from memshard.models.kernels.backend import kernels_for
from memshard.models.kernels.plain import bag_of_each_read
from memshard.models.memory.bags import segment_sums


@dataclass(frozen=True)
class Read:
    """One weighted read of a table, kept until the optimizer turns it into row gradients: about 5
    KB a token.

    rows, weights: [reads]; offsets: [bags], where each bag's reads start; upstream: [bags, dim]
    gradient of its sum.
    """

    rows: Tensor
    weights: Tensor
    offsets: Tensor
    upstream: Tensor


@dataclass(frozen=True)
class SortedReads:
    """All reads of a step, by row: the gradient of rows[i] is the sum of weights[j] *
    upstream[bags[j]] for j from starts[i].

    rows: [distinct] int64, ascending; starts: [distinct + 1] int64; bags: [reads] integers;
    weights: [reads]; upstream: [bags, dim], of the weights' dtype.
    """

    rows: Tensor
    starts: Tensor
    bags: Tensor
    weights: Tensor
    upstream: Tensor

    def scaled(self, scale: float) -> "SortedReads":
        """The same with a gradient `scale` times as large."""
        return self if scale == 1 else replace(self, weights=self.weights * scale)

    def sums(self, first: int, last: int) -> Tensor:
        """The gradients of rows[first:last], [rows, dim]."""
        return segment_sums(self.upstream, self.bags, self.weights, self.starts[first : last + 1])

    def of(self, rows: Tensor) -> "SortedReads":
        """The same gradients for other ascending rows, which include all of these; new ones get
        none.
        """
        last = torch.searchsorted(self.rows, rows[-1:], right=True)
        return replace(
            self,
            rows=rows,
            starts=self.starts[torch.cat((torch.searchsorted(self.rows, rows), last))],
        )


def sort_reads(reads: Sequence[Read]) -> SortedReads | None:
    """Merge reads, so that each row comes once over all of them: a row's gradients must be summed
    before they are squared.

    Sorted segments without atomics, so equal reads give equal bits. None if nothing was read.
    """
    if not sum(len(read.rows) for read in reads):
        return None
    dtype = torch.promote_types(reads[0].weights.dtype, torch.float32)
    rows, upstream = (
        _cat([read.rows for read in reads]),
        _cat([read.upstream for read in reads]).to(dtype),
    )
    firsts = [0]
    for read in reads:
        firsts.append(firsts[-1] + len(read.offsets))
    bags = _cat(
        [
            bag_of_each_read(read.offsets, len(read.rows)) + first
            for read, first in zip(reads, firsts, strict=False)
        ]
    )
    kernels = kernels_for(upstream, upstream) if rows.dtype == torch.int32 else None
    order, distinct, starts = (kernels or plain).sort_reads(rows)
    weights = _cat([read.weights for read in reads])[order].to(dtype)
    return SortedReads(distinct.long(), starts, bags.to(rows.dtype)[order], weights, upstream)


def row_gradients(reads: Sequence[Read], block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradient of a table: (rows, gradients), at most `block` distinct rows at a time,
    ascending, each row once.
    """
    merged = sort_reads(reads)
    if merged is not None:
        for first in range(0, len(merged.rows), block):
            last = min(first + block, len(merged.rows))
            yield merged.rows[first:last], merged.sums(first, last)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    # A single part needs no second copy in memory.
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
