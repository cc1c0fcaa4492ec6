"""Weighted sums of table rows, bag by bag, and their gradients to the weights, on the fastest path
there is.
"""

from torch import Tensor

from memshard.models.kernels import plain
from memshard.models.kernels.backend import kernels_for


def gather_sum(values: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """The sum of weights[j] * values[rows[j]] over each bag.

    values: [slots, dim]; rows: [reads] integers; weights: [reads], as wide as values or wider;
    offsets: [bags] int64, where each bag's reads start. Returns [bags, dim] in the weights' dtype;
    sums are formed in it, in fp32 at least.
    """
    return (kernels_for(values, weights) or plain).gather_sum(values, rows, weights, offsets)


def score_gradients(values: Tensor, rows: Tensor, offsets: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of `gather_sum` to its weights: values[rows[j]] . upstream[bag of j]. upstream:
    [bags, dim]; returns [reads].
    """
    return (kernels_for(values, upstream) or plain).score_gradients(values, rows, offsets, upstream)


def segment_sums(values: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """The sum of weights[j] * values[rows[j]] for starts[i] <= j < starts[i + 1], for each i; else
    as `gather_sum`. starts: [segments + 1] int64, the first and last of which need not be the
    ends of the reads.
    """
    return (kernels_for(values, weights) or plain).segment_sums(values, rows, weights, starts)
