"""The row backend in plain torch: every other backend must equal it, and falls back to it.

A read is a (row, weight) of some token; a bag is the reads of one token, which are summed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.compat import embedding_bag_weight_gradient, is_traced
from memshard.models.random import fold_tensor, random_bits

_BLOCK_READS = 4096
"""Rows of a half-precision table that are widened at a time; on a GPU 16 times as many."""
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def needed_for(values: Tensor, sums: Tensor, device_type: str) -> bool:
    """Return whether only plain torch takes these tensors, and not the kernels of a device type.

    sums: weights, gradients or whatever else is as wide as the sums. Kernels sum in fp32, index
    rows by int32 and are opaque to whatever traces torch.
    """
    return (
        values.device.type != device_type
        or values.device != sums.device
        or sums.dtype != torch.float32
        or values.dtype not in KERNEL_DTYPES
        or values.shape[1] == 0
        or len(values) >= 2**31
        or is_traced(values)
        or is_traced(sums)
    )


def gather_sum(values: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum of weights[j] * values[rows[j]] over each bag.

    values: [slots, dim]; rows: [reads] integers; weights: [reads], as wide as values or wider;
    offsets: [bags] int64, where each bag's reads start. Returns [bags, dim] in the weights' dtype;
    sums are formed in it, in fp32 at least.
    """
    if not values.shape[1]:
        return weights.new_zeros(len(offsets), 0)
    if values.dtype == weights.dtype:
        return F.embedding_bag(rows.long(), values, offsets, mode="sum", per_sample_weights=weights)
    # embedding_bag wants one dtype, and widening all rows read at once would take reads x dim x 4
    # bytes: 128 reads of 1,024 values are 512 KB a token.
    sums = weights.new_zeros(len(offsets), values.shape[1])
    bags = bag_of_each_read(offsets, len(rows))
    for block in _blocks(rows):
        sums.index_add_(
            0, bags[block], values[rows[block]].to(weights.dtype) * weights[block, None]
        )
    return sums


def score_gradients(values: Tensor, rows: Tensor, offsets: Tensor, upstream: Tensor) -> Tensor:
    """Return the gradient of `gather_sum` to its weights: values[rows[j]] . upstream[bag of j].

    upstream: [bags, dim]; returns [reads] in the wider dtype of values and upstream.
    """
    if not values.shape[1]:
        return upstream.new_zeros(len(rows))
    upstream = upstream.to(torch.promote_types(values.dtype, upstream.dtype))
    # Not len(rows), which would fix the number of reads in an exported graph.
    bags = bag_of_each_read(offsets, rows.shape[0])
    if values.dtype == upstream.dtype:
        return embedding_bag_weight_gradient(upstream, values, rows.long(), offsets, bags)
    parts = []
    for block in _blocks(rows):
        parts.append((values[rows[block]].to(upstream.dtype) * upstream[bags[block]]).sum(-1))
    return torch.cat(parts) if parts else upstream.new_zeros(0)


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Yield the reads whose rows are widened at a time."""
    size = _BLOCK_READS * (16 if rows.is_cuda else 1)
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


def segment_sums(values: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Return the sums of weights[j] * values[rows[j]] over segments of reads, [segments, dim].

    starts: [segments + 1] int64; segment i is starts[i] <= j < starts[i + 1]. The first and the
    last of them need not be the ends of the reads. Otherwise as `gather_sum`.
    """
    span = slice(int(starts[0]), int(starts[-1]))
    return gather_sum(values, rows[span], weights[span], starts[:-1] - starts[0])


def sort_reads(rows: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort reads by row, stably: equal reads then give equal bits, without atomics.

    rows: [reads] integers below `slots`. Returns the order of the reads [reads], the distinct rows
    [distinct], ascending, and where the reads of each begin [distinct + 1] int64. On a GPU as
    `sort_reads_on_device`.
    """
    if rows.is_cuda:
        return sort_reads_on_device(rows, slots)
    ascending, order = torch.sort(rows, stable=True)
    distinct, counts = torch.unique_consecutive(ascending, return_counts=True)
    return order, distinct, F.pad(counts.cumsum(0), (1, 0))


def sort_reads_on_device(rows: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `sort_reads` does without asking how many rows are distinct: the last one is
    repeated, without reads, up to the number that there may be.
    """
    ascending, order = torch.sort(rows, stable=True)
    # The number of each read's row among the distinct ones.
    number = F.pad(ascending[1:] != ascending[:-1], (1, 0)).cumsum(0)[: len(rows)]
    most = torch.arange(min(len(rows), slots) + 1, device=rows.device)
    starts = torch.searchsorted(number, most)
    return order, ascending[starts[:-1].clamp(max=len(rows) - 1)], starts


@dataclass(frozen=True)
class AdamUpdate:
    """The arguments of `adam_rows`: one Adam step on the rows of a table that have a gradient.

    values, exp_avg, exp_avg_sq, master: [slots, dim], changed in place; master is the fp32 copy of
    a half-precision table, None without one: values are then rounded stochastically. Where values
    are not what their copies round to, somebody has written them since, and they count. rows: [n]
    int64, ascending and distinct, but that the last one may be repeated, which counts once; the
    gradient of rows[i] is the sum of weights[j] * upstream[bags[j]] over starts[i] <= j < starts[i
    + 1], of fp32 at least. step_sizes, decay1, decay2: [n], numbers that differ from row to row:
    the step size in place of the common one, and the decay of both moments before the step; None
    without. first_row, first_column: where the local part begins in the whole table; they and `key`
    decide the random bits of rounding, which are then the same in every layout.
    """

    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    rows: Tensor
    starts: Tensor
    bags: Tensor
    weights: Tensor
    upstream: Tensor
    step_sizes: Tensor | None
    decay1: Tensor | None
    decay2: Tensor | None
    step_size: float
    beta1: float
    beta2: float
    eps: float
    first_row: int
    first_column: int
    key: int

    def block(self, first: int, last: int, begin: int, end: int) -> "AdamUpdate":
        """Return the same step on rows[first:last] alone, whose reads are those from begin to
        end.
        """

        def cut(by_row: Tensor | None) -> Tensor | None:
            return None if by_row is None else by_row[first:last]

        return replace(
            self,
            rows=self.rows[first:last],
            starts=self.starts[first : last + 1] - begin,
            bags=self.bags[begin:end],
            weights=self.weights[begin:end],
            step_sizes=cut(self.step_sizes),
            decay1=cut(self.decay1),
            decay2=cut(self.decay2),
        )


def needed_for_update(update: AdamUpdate, device_type: str) -> bool:
    """Return whether only plain torch takes this step, as `needed_for` says for reads."""
    return (
        needed_for(update.values, update.weights, device_type)
        or update.upstream.dtype not in KERNEL_DTYPES
        or update.exp_avg.dtype != torch.float32
        or not update.values.is_contiguous()
    )


def adam_rows(update: AdamUpdate) -> None:
    """Sum the gradient of each row and take an Adam step on it; other rows keep their bits."""
    rows, starts = update.rows, update.starts
    if not len(rows):
        return
    size = block_rows(update.upstream, len(rows))
    # The number of rows, and where the reads of each block begin: a GPU is waited for once.
    count = torch.searchsorted(rows, rows[-1:]) + 1
    count, *borders = torch.cat((count, starts[:-1:size], starts[-1:])).tolist()
    for number, first in enumerate(range(0, count, size)):
        last = min(first + size, count)
        _update_block(update.block(first, last, borders[number], borders[number + 1]))


def block_rows(upstream: Tensor, rows: int) -> int:
    """Return the number of rows whose gradients are formed at a time, from upstream [bags, dim].

    On a CPU temporaries of 1,024 rows stay in cache, 2 to 3 times faster than all at once; on a
    GPU, where a block is 17 launches, there are at most 12, or temporaries of 64 MB.
    """
    if not upstream.is_cuda:
        return 1024
    return max(1024, (1 << 24) // max(1, upstream.shape[1]), -(-rows // 12))


def _update_block(update: AdamUpdate) -> None:
    gradient = gather_sum(update.upstream, update.bags, update.weights, update.starts[:-1])
    stored = [update.values, update.exp_avg, update.exp_avg_sq]
    if update.master is not None:
        stored.append(update.master)
    picked = [tensor.index_select(0, update.rows) for tensor in stored]
    _adam(update, gradient, *picked)
    for tensor, new in zip(stored, picked, strict=True):
        # Rows are distinct, so no row is written twice and the result has no order to depend on.
        tensor.index_copy_(0, update.rows, new)


def _adam(
    update: AdamUpdate,
    gradient: Tensor,
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None = None,
) -> None:
    """Update the picked rows [n, dim] in place: fresh memory for each result would cost more than
    the arithmetic.
    """
    if update.decay1 is not None and update.decay2 is not None:
        exp_avg.mul_(update.decay1[:, None])
        exp_avg_sq.mul_(update.decay2[:, None])
    # m + (1 - beta1) (g - m), as in torch.optim.Adam, bit for bit.
    exp_avg.lerp_(gradient, 1 - update.beta1)
    exp_avg_sq.mul_(update.beta2).addcmul_(gradient, gradient, value=1 - update.beta2)
    size = update.step_size if update.step_sizes is None else update.step_sizes[:, None]
    # The gradient is spent: its memory takes the result.
    change = torch.sqrt(exp_avg_sq, out=gradient).add_(update.eps)
    torch.div(exp_avg, change, out=change).mul_(size)
    if master is not None:
        written = master.to(values.dtype) != values
        values.copy_(torch.where(written, values.to(master.dtype), master, out=master).sub_(change))
    elif values.dtype == exp_avg.dtype:
        values.sub_(change)
    else:
        exact = values.to(exp_avg.dtype).sub_(change)
        values.copy_(round_stochastically(exact, _rounding_bits(update), values.dtype))


def _rounding_bits(update: AdamUpdate) -> Tensor:
    """Return 32 random bits for each value, [n, dim] int32, the same in every layout."""
    keys = fold_tensor(update.key, update.rows + update.first_row)
    columns = torch.arange(update.values.shape[1], device=keys.device, dtype=torch.int32)
    return random_bits(keys[:, None], columns + update.first_column)


def round_stochastically(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round x [fp32] to fp16 or bf16, up or down with probabilities that make the mean x.

    bits: int32, 32 random bits for each value. A change of a hundredth of the distance between two
    neighbours is lost in 99 of 100 steps and counts 100 times in the other. A value that `dtype`
    holds stays, and what to the nearest is finite stays finite.
    """
    mantissa, smallest = (10, -14) if dtype == torch.float16 else (7, -112)
    exponent = (x.view(torch.int32) & 0x7F800000).clamp(min=(127 + smallest) << 23)
    # The distance of neighbouring values of `dtype` around x, and its inverse: powers of two, so
    # scaling is exact.
    quantum = (exponent - (mantissa << 23)).view(torch.float32)
    inverse = ((254 << 23) - (exponent - (mantissa << 23))).view(torch.float32)
    size = x.abs()
    scaled = size * inverse
    whole = scaled.floor()
    # The middles of 2^23 equal parts of [0, 1), exact in fp32. The fraction of a number in the
    # normal range of fp16 has 13 bits, in that of bf16 16: so many of the middles are below it as
    # its share of 1 is, exactly. Adding them instead would round the sum, upwards on average.
    uniform = ((bits >> 9 & 0x7FFFFF).float() + 0.5) * 2.0**-23
    rounded = (whole + (uniform < scaled - whole)) * quantum
    largest = torch.finfo(dtype).max
    rounded.masked_fill_((rounded > largest) & (size < largest + quantum / 2), largest)
    return rounded.copysign(x).to(dtype)


def bag_of_each_read(offsets: Tensor, reads: int) -> Tensor:
    """Return the number of each read's bag, [reads] int64."""
    lengths = torch.diff(offsets, append=offsets.new_full((1,), reads))
    return torch.repeat_interleave(lengths, output_size=reads) if offsets.shape[0] else offsets
