"""From collected reads to summed gradients of single rows, in bounded blocks and a fixed order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memshard.models.kernels import plain_rows
from memshard.models.kernels.backend import RowBackend
from memshard.models.kernels.plain_rows import bag_of_each_read, block_rows


@dataclass(frozen=True)
class Read:
    """Weighted reads of a table, kept until the optimizer turns them into row gradients.

    rows, weights: [reads]; offsets: [bags], where each bag's reads start; upstream: [bags, dim],
    the gradient of the bags' sums. About 5 KB a token with 128 reads of 1,024 values.
    """

    rows: Tensor
    weights: Tensor
    offsets: Tensor
    upstream: Tensor


@dataclass(frozen=True)
class SortedReads:
    """All reads of a step, by row.

    The gradient of rows[i] is the sum of weights[j] * upstream[bags[j]] over starts[i] <= j <
    starts[i + 1]. rows: [distinct] int64, ascending; starts: [distinct + 1] int64; bags: [reads]
    integers; weights: [reads]; upstream: [bags, dim], of the weights' dtype, or on a GPU narrower;
    backend: forms sums. On a GPU, which alone knows how many are distinct, the last row is
    repeated, without reads.
    """

    rows: Tensor
    starts: Tensor
    bags: Tensor
    weights: Tensor
    upstream: Tensor
    backend: RowBackend

    @property
    def count(self) -> int | Tensor:
        """The number of distinct rows; on a GPU a number on the device."""
        return len(self.rows) if not self.rows.is_cuda else self.rows.diff().count_nonzero() + 1

    def scaled(self, scale: float | Tensor) -> "SortedReads":
        """Return the same reads with a gradient `scale` times as large."""
        if not (isinstance(scale, Tensor) and scale.is_cuda) and scale == 1:
            return self
        # One factor a read in place of one for each of its dim values: a gradient is
        # linear in weights.
        return replace(self, weights=self.weights * scale)

    def sums(self, first: int, last: int) -> Tensor:
        """Return the gradients of rows[first:last], [last - first, dim]."""
        return self.backend.segment_sums(
            self.upstream, self.bags, self.weights, self.starts[first : last + 1]
        )

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows whose gradients fit into cache or bounded memory."""
        size = block_rows(self.upstream, len(self.rows))
        for first in range(0, len(self.rows), size):
            yield first, min(first + size, len(self.rows))

    def of(self, rows: Tensor) -> "SortedReads":
        """Return the same gradients for other ascending rows, which include all of these.

        New rows have no reads.
        """
        # A new row's segment begins where the next old one does, so it is empty.
        last = torch.searchsorted(self.rows, rows[-1:], right=True)
        return replace(
            self,
            rows=rows,
            starts=self.starts[torch.cat((torch.searchsorted(self.rows, rows), last))],
        )


def sort_reads(reads: Sequence[Read], backend: RowBackend, slots: int) -> SortedReads | None:
    """Merge reads so that each row comes once over all of them; None if nothing was read.

    slots: the number of rows there are. A row's gradients must be summed before they are squared
    for Adam's second moment.
    """
    if not sum(len(read.rows) for read in reads):
        return None
    dtype = torch.promote_types(reads[0].weights.dtype, torch.float32)
    rows = _cat([read.rows for read in reads])
    upstream = _cat([read.upstream for read in reads])
    if not upstream.is_cuda or backend is plain_rows:
        # Kernels of GPUs read it as narrow as it is.
        upstream = upstream.to(dtype)
    # Each read numbers its bags from 0; in the joined `upstream` they follow one another.
    firsts = [0]
    for read in reads:
        firsts.append(firsts[-1] + len(read.offsets))
    bags = _cat(
        [
            bags + first if first else bags
            # `firsts` has one entry more, the number of all bags.
            for read, first in zip(reads, firsts, strict=False)
            for bags in [bag_of_each_read(read.offsets, len(read.rows))]
        ]
    )
    order, distinct, starts = backend.sort_reads(rows, slots)
    weights = _cat([read.weights for read in reads])[order].to(dtype)
    # Numbers of bags as narrow as those of rows, int32 for tables below 2^31: 4 bytes a read.
    return SortedReads(
        distinct.long(), starts, bags.to(rows.dtype)[order], weights, upstream, backend
    )


def row_gradients(
    reads: Sequence[Read], block: int, backend: RowBackend
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the gradient of a table as (rows, gradients), at most `block` rows at a time.

    Rows are ascending and distinct, but that on a GPU the last one comes again, with zeros;
    gradients are [rows, dim].
    """
    merged = sort_reads(reads, backend, sum(len(read.rows) for read in reads))
    if merged is not None:
        for first in range(0, len(merged.rows), block):
            last = min(first + block, len(merged.rows))
            yield merged.rows[first:last], merged.sums(first, last)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    # A single part needs no second copy in memory.
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
