"""A value table whose ranks each hold a slice of every value."""

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.memory.table import bag_offsets
from memshard.parallel.collectives import exchange, share_counts
from memshard.parallel.tables.sharded import ShardedTable, piece


class ColumnShardedTable(ShardedTable):
    """Each rank holds some columns of all rows: every rank sees all reads, and returns its slice of every token's sum.

    2 (P - 1) / P * d b + (P - 1) * reads * (i + 2 b) bytes a token, forward and backward (d values; sums, weights and gradients of
    b = 4 bytes, ids of i = 4; P ranks). The load is even whatever is read, but each rank sorts the reads of all.
    """

    spec_dim = 1

    def __init__(self, slots: int, dim: int, group: dist.ProcessGroup, replicas: dist.ProcessGroup | None = None) -> None:
        super().__init__(slots, dim, group, replicas, held=range(slots), columns=piece(dim, group))
        self.observers = self.ranks

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """As `ValueTable.weighted_sum`. Each rank passes its own tokens."""
        self._count(rows)
        tokens, ranks = len(rows), self.ranks
        ours = [tokens] * ranks
        theirs = share_counts(ours, self.group, rows.device)
        wire = rows.to(torch.int32 if self.slots < 2**31 else torch.int64)
        weights = weights.to(torch.promote_types(weights.dtype, self.weight.dtype))
        all_rows = exchange(wire.repeat(ranks, 1), ours, theirs, self.group, self.traffic)
        # Backward of the repetition adds the ranks' gradients up: each knows the part of its own columns.
        all_weights = exchange(weights.repeat(ranks, 1), ours, theirs, self.group, self.traffic)
        slices = self._local_sum(all_rows.flatten(), all_weights.flatten(), bag_offsets(all_rows))

        width, widths = len(self.columns), self._widths()
        receive = [tokens * other for other in widths]
        parts = exchange(slices.flatten(), [count * width for count in theirs], receive, self.group, self.traffic).split(receive)
        return torch.cat([part.view(tokens, other) for part, other in zip(parts, widths, strict=True)], dim=1)

    def _widths(self) -> list[int]:
        """How many columns each rank holds."""
        width = -(-self.dim // self.ranks)
        return [min(max(self.dim - rank * width, 0), width) for rank in range(self.ranks)]
