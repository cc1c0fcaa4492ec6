"""Functions of torch that it does not promise to keep, in one place, each with a way without it.

Tested with torch 2.13. Where a release renames one of them, the slower or narrower way below takes
over, and the tests of this file say which.
"""

import torch
from torch import Tensor, nn


def backward_keeps_graph() -> bool:
    """Return whether the backward pass that is running was asked to keep its graph.

    Without torch's answer it is taken to: results are the same, and memory is freed later.
    """
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else bool(keeps())


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called, so that calling it runs compiled code."""
    return getattr(module, "_compiled_call_impl", None) is not None


def embedding_bag_weight_gradient(
    upstream: Tensor, values: Tensor, rows: Tensor, offsets: Tensor, bags: Tensor
) -> Tensor:
    """Return values[rows[j]] . upstream[bags[j]], the gradient of an embedding bag's weights.

    upstream: [bags, dim]; values: [slots, dim]; rows, bags: [reads] int64; offsets: [bags] int64;
    returns [reads]. torch's own backward makes no [reads, dim] temporary; the other way does.
    """
    try:
        backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    except AttributeError:
        return (values[rows] * upstream[bags]).sum(-1)
    gradient: Tensor = backward(upstream, values, rows, offsets, bags, 0)  # 0: bags are summed
    return gradient
