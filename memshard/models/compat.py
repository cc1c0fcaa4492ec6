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


def backward_wants(leaf: Tensor) -> bool:
    """Return whether the backward pass that is running was asked for a leaf's gradient.

    It was not if `backward(inputs=...)` or `torch.autograd.grad` name other tensors. Without
    torch's answer it is taken to be, so a hidden table would then learn from every pass.
    """
    asks = getattr(torch._C, "_will_engine_execute_node", None)
    if asks is None:
        return True
    try:
        return bool(asks(torch.autograd.graph.get_gradient_edge(leaf).node))
    except RuntimeError:
        # torch does not answer where `torch.autograd.grad` names the leaf itself: it is wanted.
        return True


def in_backward() -> bool:
    """Return whether a backward pass is running, which may call layers again.

    Without torch's answer it is taken not to, so statistics count a batch twice that activation
    checkpointing outside of the trainer runs twice, as those of torch's batch norm do.
    """
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def in_transform(x: Tensor) -> bool:
    """Return whether x is seen through `torch.func.vmap`, `grad` and the like.

    Without torch's answer it is taken not to be, and torch's own error follows.
    """
    functorch = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return wrapped is not None and bool(wrapped(x))


def break_graph(reason: str) -> None:
    """Let torch.compile begin a new graph here, or end with this reason if it may not.

    Without the function it stops at what it cannot trace, in its own words.
    """
    graph_break = getattr(torch._dynamo, "graph_break", None)
    if graph_break is not None:
        graph_break(msg=reason)


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
