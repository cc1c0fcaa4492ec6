"""Row gradients summed over ranks that hold the same rows, in bounded blocks."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.memory.row_gradient import SortedReads
from memshard.parallel.collectives import Traffic

_BLOCK_BYTES = 1 << 24


def add_replicas(
    merged: SortedReads | None, dim: int, like: Tensor, group: dist.ProcessGroup, traffic: Traffic
) -> Iterator[SortedReads]:
    """The sum over the ranks of a group of their gradients of the same rows; the same bits on every
    rank.

    merged: this rank's, of width `dim`; None if it read nothing. like: a tensor of the gradient's
    dtype and device. All ranks must take part. The ranks first agree on the rows that any of them
    read (an all-gather of row numbers), then sum 16 MB of these rows' gradients at a time: 2 (R -
    1) / R bytes sent for a byte of gradient, R ranks.
    """
    own = like.new_empty(0, dtype=torch.int64) if merged is None else merged.rows
    rows = torch.unique(_gather_rows(own, group, traffic))
    if not len(rows):
        return
    ranks = dist.get_world_size(group)
    everything = None if merged is None else merged.of(rows)
    block = max(1, _BLOCK_BYTES // max(1, dim * like.element_size()))
    for first in range(0, len(rows), block):
        part = rows[first : first + block]
        own_sums = (
            like.new_zeros(len(part), dim)
            if everything is None
            else everything.sums(first, first + len(part))
        )
        sums = own_sums.to(like.dtype)
        dist.all_reduce(sums, group=group)
        traffic.replicas += 2 * (ranks - 1) * sums.numel() * sums.element_size() // ranks
        numbers = torch.arange(len(part) + 1, device=rows.device)
        yield SortedReads(
            part, starts=numbers, bags=numbers[:-1], weights=sums.new_ones(len(part)), upstream=sums
        )


def _gather_rows(own: Tensor, group: dist.ProcessGroup, traffic: Traffic) -> Tensor:
    """The row numbers of all ranks, one after the other, in int32 on the way where all fit."""
    ranks = dist.get_world_size(group)
    most = int(own[-1]) if len(own) else 0
    facts = [torch.empty(2, dtype=torch.int64, device=own.device) for _ in range(ranks)]
    dist.all_gather(facts, torch.tensor([len(own), most], device=own.device), group=group)
    counts, highest = torch.stack(facts).T.tolist()
    if not max(counts):
        return own
    padded = own.new_zeros(max(counts), dtype=torch.int32 if max(highest) < 2**31 else torch.int64)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    traffic.replicas += (ranks - 1) * padded.numel() * padded.element_size()
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).long()
