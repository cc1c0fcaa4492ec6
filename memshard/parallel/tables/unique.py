"""A value table split by rows; readers fetch each distinct row they need once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.kernels.backend import backend_for
from memshard.models.memory.autograd import Fetch, FetchedDot, FetchedSum
from memshard.models.memory.table import bag_offsets
from memshard.parallel.collectives import exchange, share_sizes
from memshard.parallel.tables.layouts import LAYOUTS
from memshard.parallel.tables.rows import RowShardedTable


class UniqueRowTable(RowShardedTable):
    """Rows split as in `RowShardedTable`; the owner sends the distinct rows that a rank reads, and
    gets their summed gradients back.

    (P - 1) / P * reads / duplicates * (d (v + b) + i) bytes a token (d values of v bytes a row and
    b = 4 a gradient, ids of i = 4 bytes, P ranks, each row read `duplicates` times by the rank):
    nearly independent of P, and few where reads repeat. Fetched rows are kept for backward.
    """

    layout = LAYOUTS["rows-unique"]

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Do what `ValueTable.weighted_sum` does, with row numbers of the whole table. Each
        rank passes its own tokens.
        """
        self._count(rows)
        fetch = self._plan(rows, weights.detach())
        weights = weights.flatten().to(torch.promote_types(weights.dtype, self.weight.dtype))
        return FetchedSum.apply(weights, self.autograd_handle, fetch)

    def dot(self, rows: Tensor, x: Tensor) -> Tensor:
        """Do what `ValueTable.dot` does, for the fetched rows. It sends as many bytes as
        `weighted_sum` does.
        """
        self._count(rows)
        fetch = self._plan(rows, torch.ones_like(rows, dtype=x.dtype))
        return FetchedDot.apply(
            x.to(torch.promote_types(x.dtype, self.weight.dtype)), self.autograd_handle, fetch
        ).view(rows.shape)

    def _plan(self, rows: Tensor, weights: Tensor) -> "_Fetch":
        """Tell the owners which rows this rank wants; return what they need to answer."""
        # Ascending, so each owner's rows are contiguous. What torch.unique does, without asking the
        # device how many there are: that comes with the sizes, the one wait of a read.
        ascending, order = torch.sort(rows.flatten(), stable=True)
        new = torch.ones_like(ascending, dtype=torch.bool)
        torch.ne(ascending[1:], ascending[:-1], out=new[1:])
        number = new.cumsum(0)
        ends = torch.arange(1, self.ranks + 1, device=rows.device) * self.rows_per_rank
        before = F.pad(number, (1, 0))[torch.searchsorted(ascending, ends)]
        ours, theirs = share_sizes(before.diff(prepend=before.new_zeros(1)), self.group)
        starts = torch.searchsorted(number, torch.arange(1, sum(ours) + 2, device=rows.device))
        distinct = ascending[starts[:-1]]
        inverse = torch.empty_like(number).scatter_(0, order, number - 1)
        wanted = (
            exchange(self._wire(distinct), ours, theirs, self.group, self.traffic) - self.first_row
        )
        if self.observer is not None:
            # Owners see distinct rows only, so what usage counts (reads and summed
            # weights) is sent extra.
            flat = weights.flatten().double().abs()
            sums = torch.zeros(len(distinct), 2, dtype=torch.float64, device=rows.device)
            sums.index_add_(0, inverse, torch.stack((flat, torch.ones_like(flat)), dim=1))
            seen = exchange(sums, ours, theirs, self.group)
            self.observer.on_read(wanted, seen[:, 0], seen[:, 1])
        backend, _ = backend_for(rows.device)
        return _Fetch(
            self,
            wanted,
            inverse.to(torch.int32),
            order.to(torch.int32),
            starts,
            bag_offsets(rows),
            backend,
            ours,
            theirs,
        )


@dataclass(frozen=True)
class _Fetch(Fetch):
    """wanted: local rows that other ranks asked for. ours, theirs: numbers of rows received from
    and sent to each rank.
    """

    table: UniqueRowTable
    ours: list[int]
    theirs: list[int]

    def fetch_rows(self) -> Tensor:
        """Return the rows that this rank asked for."""
        return exchange(
            super().fetch_rows(), self.theirs, self.ours, self.table.group, self.table.traffic
        )

    def return_gradients(self, gradients: Tensor, learns: bool) -> None:
        """Send the row gradients to the owners."""
        # Even if the table does not learn, since the other ranks wait in this exchange.
        received = exchange(gradients, self.ours, self.theirs, self.table.group, self.table.traffic)
        super().return_gradients(received, learns)
