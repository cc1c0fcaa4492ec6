"""Sum row gradients over the ranks that store the same rows, in bounded blocks."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.kernels.backend import RowBackend
from memshard.models.memory.row_gradient import SortedReads
from memshard.parallel.collectives import Traffic, share_count

_BLOCK_BYTES = 1 << 24


def add_replicas(
    merged: SortedReads | None,
    slots: int,
    dim: int,
    like: Tensor,
    group: dist.ProcessGroup,
    traffic: Traffic,
    backend: RowBackend,
) -> Iterator[SortedReads]:
    """Yield the sum over the ranks of a group of their gradients, the same bits on every rank.

    merged: this rank's gradients, of width `dim`, of some of `slots` rows; None if it read nothing.
    like: a tensor of the gradient's dtype and device. All ranks must take part. The ranks first
    agree on the rows that any of them read (an all-gather of row numbers), then sum 16 MB of these
    rows' gradients at a time: 2 (R - 1) / R bytes sent for a byte of gradient, R ranks.
    """
    nothing = like.new_empty(0, dtype=torch.int64)
    local_rows, count = (nothing, 0) if merged is None else (merged.rows, merged.count)
    if like.is_cuda and merged is None:
        count = nothing.sum()
    # The same sorted list on every rank, so position k of every block is the same row everywhere.
    rows = torch.unique(_gather_rows(local_rows, count, slots, group, traffic))
    if not len(rows):
        return
    ranks = dist.get_world_size(group)
    everything = None if merged is None else merged.of(rows)
    block = max(1, _BLOCK_BYTES // max(1, dim * like.element_size()))
    for first in range(0, len(rows), block):
        part = rows[first : first + block]
        local_sums = (
            like.new_zeros(len(part), dim)
            if everything is None
            else everything.sums(first, first + len(part))
        )
        sums = local_sums.to(like.dtype)
        dist.all_reduce(sums, group=group)
        traffic.replicas += 2 * (ranks - 1) * sums.numel() * sums.element_size() // ranks
        numbers = torch.arange(len(part) + 1, device=rows.device)
        # As one read of weight 1 for each row, so that the update need not know about replicas.
        yield SortedReads(
            part,
            starts=numbers,
            bags=numbers[:-1],
            weights=sums.new_ones(len(part)),
            upstream=sums,
            backend=backend,
        )


def _gather_rows(
    local: Tensor, count: int | Tensor, slots: int, group: dist.ProcessGroup, traffic: Traffic
) -> Tensor:
    """Return the first `count` row numbers of all ranks, one rank after another; sent in int32 if
    all fit. A GPU, which alone knows its count, is waited for.
    """
    ranks, counts = dist.get_world_size(group), share_count(count, group, local.device)
    most = max(counts)
    if not most:
        return local[:0]
    padded = local.new_zeros(most, dtype=torch.int32 if slots < 2**31 else torch.int64)
    padded[: len(local)] = local[:most]
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    traffic.replicas += (ranks - 1) * padded.numel() * padded.element_size()
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).long()
