"""A value table split by rows over a group of ranks; the owner of rows sums the reads of them."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.parallel.collectives import exchange, share_sizes
from memshard.parallel.tables.layouts import LAYOUTS
from memshard.parallel.tables.sharded import ShardedTable, shard_range


class RowShardedTable(ShardedTable):
    """Each rank stores a contiguous range of rows, trains it and answers reads of it.

    A read travels as (row, weight) to the row's owner, which returns one partial sum per token and
    rank: 2 (P - 1) d b + (P - 1) / P * reads * (i + 2 b) bytes a token, forward and backward, and
    (P - 1) i for how many of the token's reads each owner gets (d values; sums, weights and
    gradients of b = 4 bytes, ids of i = 4; P ranks).
    """

    layout = LAYOUTS["rows"]

    def __init__(
        self,
        slots: int,
        dim: int,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        self.rows_per_rank = -(-slots // dist.get_world_size(group))
        super().__init__(slots, dim, group, replicas, local_rows=shard_range(slots, group))

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Do what `ValueTable.weighted_sum` does, with row numbers of the whole table. Each
        rank passes its own tokens.
        """
        self._count(rows)
        route = self._ask(rows)
        weights = weights.to(torch.promote_types(weights.dtype, self.weight.dtype))
        their_weights = exchange(
            weights.flatten()[route.order],
            route.our_reads,
            route.their_reads,
            self.group,
            self.traffic,
        )
        partial = self._local_sum(route.rows, their_weights, route.offsets)
        our_tokens = [len(rows)] * self.ranks
        sums = exchange(partial, route.their_tokens, our_tokens, self.group, self.traffic)
        # In the order of ranks, so the result does not depend on which answer came first.
        return sums.view(self.ranks, len(rows), self.dim).sum(0)

    def dot(self, rows: Tensor, x: Tensor) -> Tensor:
        """Do what `ValueTable.dot` does: tokens travel to all owners, products back.

        It sends as many bytes as `weighted_sum`.
        """
        self._count(rows)
        route = self._ask(rows)
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        their_x = exchange(
            x.repeat(self.ranks, 1),
            [len(rows)] * self.ranks,
            route.their_tokens,
            self.group,
            self.traffic,
        )
        products = self._local_dot(route.rows, their_x, route.offsets)
        ours = exchange(products, route.their_reads, route.our_reads, self.group, self.traffic)
        # argsort of a permutation is its inverse: answers go back to the order of the reads.
        return ours[torch.argsort(route.order)].view(rows.shape)

    def gather_rows(self, x: Tensor, rows: Tensor, slots: int | None = None) -> Tensor:
        """Do what `ValueTable.gather_rows` does; all ranks of the group call it, each
        for its rows.
        """
        slots = slots or self.slots
        owner = torch.div(rows, -(-slots // self.ranks), rounding_mode="floor")
        order = torch.sort(owner, stable=True).indices
        ours, theirs = share_sizes(_histogram(owner, self.ranks), self.group)
        asked = (
            exchange(rows[order], ours, theirs, self.group) - shard_range(slots, self.group).start
        )
        received = exchange(x[asked], theirs, ours, self.group)
        return torch.empty_like(received).index_copy_(0, order, received)

    @property
    def max_local_rows(self) -> int:
        """The number of rows of the rank that stores most."""
        return self.rows_per_rank

    def _ask(self, rows: Tensor) -> "_Route":
        """Send each read's row number to the row's owner."""
        tokens, ranks = len(rows), self.ranks
        owner = self._owner(rows)
        # Stable: within an owner, reads stay in the order of tokens, so each token's
        # reads are one bag.
        order = torch.sort(owner.flatten(), stable=True).indices
        # How many of each token's reads go to each owner, [ranks, tokens]: the lengths of the bags
        # that the owner sums.
        bags = owner * tokens + torch.arange(tokens, device=rows.device)[:, None]
        lengths = _histogram(bags.flatten(), ranks * tokens).view(ranks, tokens)
        their_tokens = self.tokens_of_ranks(tokens, rows.device)
        # The one wait of a read: NCCL wants sizes from the host, and these depend on the search.
        our_reads, their_reads = share_sizes(lengths.sum(1), self.group)
        their_lengths = exchange(
            lengths.flatten().int(), [tokens] * ranks, their_tokens, self.group, self.traffic
        ).long()
        their_rows = (
            exchange(
                self._wire(rows.flatten()[order]), our_reads, their_reads, self.group, self.traffic
            )
            - self.first_row
        )
        return _Route(
            order,
            our_reads,
            their_reads,
            their_tokens,
            their_rows,
            their_lengths.cumsum(0) - their_lengths,
        )

    def _owner(self, rows: Tensor) -> Tensor:
        """Return the rank that stores each row, int64."""
        return torch.div(rows, self.rows_per_rank, rounding_mode="floor").long()

    def _wire(self, rows: Tensor) -> Tensor:
        """Return row numbers in the dtype in which they are sent."""
        return rows.to(torch.int32 if self.slots < 2**31 else torch.int64)


def _histogram(numbers: Tensor, size: int) -> Tensor:
    """Return how often each number below `size` occurs, int64."""
    # torch.bincount waits for the device, to look for the largest number.
    return numbers.new_zeros(size).scatter_add_(0, numbers, torch.ones_like(numbers))


@dataclass(frozen=True)
class _Route:
    """Where reads went.

    order: [reads], this rank's reads by owner; our_reads: number sent to each rank; their_reads,
    their_tokens: numbers received from each rank; rows, offsets: [their reads] and [their bags],
    what the others ask of this rank.
    """

    order: Tensor
    our_reads: list[int]
    their_reads: list[int]
    their_tokens: list[int]
    rows: Tensor
    offsets: Tensor
