"""A value table split by rows over a group of ranks, sums pooled at the owner."""

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.memory.table import ValueTable
from memshard.parallel.collectives import exchange


class RowShardedTable(ValueTable):
    """Each rank holds a contiguous range of rows, trains it and answers reads of it. Hidden from the start.

    A read travels as (row, weight) to the row's owner, which returns one partial sum per token and rank:
    2 (P - 1) d b + (P - 1) / P * reads * (i + 2 b) bytes a token, forward and backward (d values of b bytes, ids of i
    bytes, P ranks). Gradients to weights are exact. All ranks of the group must read at the same time, if only 0 tokens.
    """

    def __init__(self, slots: int, dim: int, group: dist.ProcessGroup) -> None:
        self.ranks = dist.get_world_size(group)
        self.rows_per_rank = -(-slots // self.ranks)
        first = min(dist.get_rank(group) * self.rows_per_rank, slots)
        super().__init__(slots, dim, held=range(first, min(first + self.rows_per_rank, slots)))
        self.group = group
        self.hide()

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowShardedTable":
        # A process group cannot be copied; the copy answers to the same ranks.
        memo[id(self.group)] = self.group
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """As `ValueTable.weighted_sum`, with row numbers of the whole table. Each rank passes its own tokens."""
        tokens, ranks = len(rows), self.ranks
        owner = torch.div(rows, self.rows_per_rank, rounding_mode="floor")
        order = torch.sort(owner.flatten(), stable=True).indices
        # How many of each token's reads go to each owner, [ranks, tokens]: the lengths of the bags that the owner sums.
        bags = owner * tokens + torch.arange(tokens, device=rows.device)[:, None]
        lengths = torch.bincount(bags.flatten(), minlength=ranks * tokens).view(ranks, tokens)
        reads = lengths.sum(1)
        sizes = torch.stack((reads, torch.full_like(reads, tokens)), dim=1)
        their_reads, their_tokens = exchange(sizes, [1] * ranks, [1] * ranks, self.group).T.tolist()
        our_reads, our_tokens = reads.tolist(), [tokens] * ranks

        their_lengths = exchange(lengths.flatten(), our_tokens, their_tokens, self.group)
        their_rows = exchange(rows.flatten()[order], our_reads, their_reads, self.group) - self.first_row
        their_weights = exchange(weights.flatten()[order].to(self.weight.dtype), our_reads, their_reads, self.group)
        partial = self._local_sum(their_rows, their_weights, their_lengths.cumsum(0) - their_lengths)
        return exchange(partial, their_tokens, our_tokens, self.group).view(ranks, tokens, self.dim).sum(0)
