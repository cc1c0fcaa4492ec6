"""A value table split by columns: each rank stores a slice of every value."""

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.memory.table import bag_offsets
from memshard.parallel.collectives import exchange
from memshard.parallel.tables.layouts import LAYOUTS
from memshard.parallel.tables.sharded import ShardedTable, shard_range


class ColumnShardedTable(ShardedTable):
    """Each rank stores some columns of all rows, sees all reads and returns a slice of each sum.

    2 (P - 1) / P * d b + (P - 1) * reads * (i + 2 b) bytes a token, forward and backward (d values;
    sums, weights and gradients of b = 4 bytes, ids of i = 4; P ranks). The load is even whatever is
    read, but each rank sorts the reads of all.
    """

    layout = LAYOUTS["columns"]

    def __init__(
        self,
        slots: int,
        dim: int,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            slots,
            dim,
            group,
            replicas,
            local_rows=range(slots),
            local_columns=shard_range(dim, group),
        )
        self.ranks_seeing_each_read = self.ranks

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Do what `ValueTable.weighted_sum` does. Each rank passes its own tokens."""
        self._count(rows)
        tokens, ranks = len(rows), self.ranks
        ours, theirs = [tokens] * ranks, self.tokens_of_ranks(tokens, rows.device)
        wire = rows.to(torch.int32 if self.slots < 2**31 else torch.int64)
        weights = weights.to(torch.promote_types(weights.dtype, self.weight.dtype))
        all_rows = exchange(wire.repeat(ranks, 1), ours, theirs, self.group, self.traffic)
        # Backward of `repeat` sums the ranks' gradients: each rank has those of its columns.
        all_weights = exchange(weights.repeat(ranks, 1), ours, theirs, self.group, self.traffic)
        slices = self._local_sum(all_rows.flatten(), all_weights.flatten(), bag_offsets(all_rows))
        # Sums of slices are slices of sums: no addition follows, each rank puts
        # columns side by side.
        return self.join(slices, theirs, tokens)

    def dot(self, rows: Tensor, x: Tensor) -> Tensor:
        """Do what `ValueTable.dot` does: slices of tokens travel to their rank and partial
        products back.

        It sends as many bytes as `weighted_sum`.
        """
        self._count(rows)
        tokens, ranks = len(rows), self.ranks
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        ours, theirs = [tokens] * ranks, self.tokens_of_ranks(tokens, rows.device)
        wire = rows.to(torch.int32 if self.slots < 2**31 else torch.int64)
        all_rows = exchange(wire.repeat(ranks, 1), ours, theirs, self.group, self.traffic)
        widths, width = self._widths(), len(self.local_columns)
        slices = torch.cat([part.flatten() for part in x.split(widths, dim=1)])
        send, receive = [tokens * other for other in widths], [count * width for count in theirs]
        all_x = exchange(slices, send, receive, self.group, self.traffic).view(sum(theirs), width)
        products = self._local_dot(all_rows.flatten(), all_x, bag_offsets(all_rows)).view(
            all_rows.shape
        )
        return (
            exchange(products, theirs, ours, self.group, self.traffic)
            .view(ranks, *rows.shape)
            .sum(0)
        )

    def join(self, slices: Tensor, theirs: list[int], tokens: int) -> Tensor:
        """Send every rank the slices of its tokens, and receive the other slices of ours.

        slices: [sum(theirs), columns]; returns [tokens, dim].
        """
        width, widths = len(self.local_columns), self._widths()
        receive = [tokens * other for other in widths]
        parts = exchange(
            slices.flatten(), [count * width for count in theirs], receive, self.group, self.traffic
        ).split(receive)
        return torch.cat(
            [part.view(tokens, other) for part, other in zip(parts, widths, strict=True)], dim=1
        )

    def _widths(self) -> list[int]:
        """Return the number of columns of each rank."""
        width = -(-self.dim // self.ranks)
        return [min(max(self.dim - rank * width, 0), width) for rank in range(self.ranks)]
