"""From collected reads to summed gradients of single rows, in bounded blocks and a fixed order."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.memory.table import Read


def row_gradients(reads: Sequence[Read], dtype: torch.dtype, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradient of a table: dV[r] = sum over reads of row r of weight * upstream.

    Yields (rows, gradients), at most `block` distinct rows at a time, ascending, each row once over all reads: a row's
    gradients must be summed before they are squared. rows: [n] int64; gradients: [n, dim] in `dtype`. Sorted segment
    sums without atomics, so equal reads give equal bits.
    """
    if not reads:
        return
    rows = torch.cat([read.rows for read in reads])
    if not len(rows):
        return
    rows, order = torch.sort(rows, stable=True)
    bags = _bag_of_each_read(reads)[order]
    weights = torch.cat([read.weights for read in reads])[order].to(dtype)
    upstream = torch.cat([read.upstream for read in reads]).to(dtype)
    distinct, counts = torch.unique_consecutive(rows, return_counts=True)
    starts = F.pad(counts.cumsum(0), (1, 0))
    for first in range(0, len(distinct), block):
        segment = starts[first : first + block + 1]
        span = slice(int(segment[0]), int(segment[-1]))
        offsets = segment[:-1] - segment[0]
        yield (
            distinct[first : first + block],
            F.embedding_bag(bags[span], upstream, offsets, mode="sum", per_sample_weights=weights[span]),
        )


def _bag_of_each_read(reads: Sequence[Read]) -> Tensor:
    """[all reads] int64: index of each read's bag among the bags of all reads."""
    parts, first = [], 0
    for read in reads:
        ends = torch.cat((read.offsets[1:], read.offsets.new_tensor([len(read.rows)])))
        bags = torch.arange(first, first + len(read.offsets), device=read.rows.device)
        parts.append(bags.repeat_interleave((ends - read.offsets) if len(bags) else bags))
        first += len(read.offsets)
    return torch.cat(parts)
