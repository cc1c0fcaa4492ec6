"""Weighted sums of rows, bag by bag, and their gradients to the weights, in plain torch: what every
faster path must equal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_READS = 4096
"""Rows of a half-precision table that are widened at a time."""


def gather_sum(values: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """The sum of weights[j] * values[rows[j]] over each bag.

    values: [slots, dim]; rows: [reads] integers; weights: [reads], as wide as values or wider;
    offsets: [bags] int64, where each bag's reads start. Returns [bags, dim] in the weights' dtype;
    sums are formed in it, in fp32 at least.
    """
    if not values.shape[1]:
        return weights.new_zeros(len(offsets), 0)
    if values.dtype == weights.dtype:
        return F.embedding_bag(rows.long(), values, offsets, mode="sum", per_sample_weights=weights)
    sums = weights.new_zeros(len(offsets), values.shape[1])
    bags = bag_of_each_read(offsets, len(rows))
    for start in range(0, len(rows), _BLOCK_READS):
        block = slice(start, start + _BLOCK_READS)
        sums.index_add_(
            0, bags[block], values[rows[block]].to(weights.dtype) * weights[block, None]
        )
    return sums


def score_gradients(values: Tensor, rows: Tensor, offsets: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of `gather_sum` to its weights: values[rows[j]] . upstream[bag of j]. upstream:
    [bags, dim]; returns [reads].
    """
    if not values.shape[1]:
        return upstream.new_zeros(len(rows))
    bags = bag_of_each_read(offsets, len(rows))
    if values.dtype == upstream.dtype:
        gradient: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            upstream, values, rows.long(), offsets, bags, 0
        )
        return gradient
    parts = []
    for start in range(0, len(rows), _BLOCK_READS):
        block = slice(start, start + _BLOCK_READS)
        parts.append((values[rows[block]].to(upstream.dtype) * upstream[bags[block]]).sum(-1))
    return torch.cat(parts) if parts else upstream.new_zeros(0)


def segment_sums(values: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """As `bags.segment_sums`."""
    span = slice(int(starts[0]), int(starts[-1]))
    return gather_sum(values, rows[span], weights[span], starts[:-1] - starts[0])


def sort_reads(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stable sort: the order of the reads [reads], the distinct rows [distinct] and where each
    begins [distinct + 1].
    """
    ascending, order = torch.sort(rows, stable=True)
    distinct, counts = torch.unique_consecutive(ascending, return_counts=True)
    return order, distinct, F.pad(counts.cumsum(0), (1, 0))


def bag_of_each_read(offsets: Tensor, reads: int) -> Tensor:
    """[reads] int64: the number of each read's bag."""
    lengths = torch.diff(offsets, append=offsets.new_tensor([reads]))
    return torch.repeat_interleave(lengths, output_size=reads) if len(offsets) else offsets
