"""Functions of torch that it does not promise to keep, in one place, each with a way without it.

Tested with torch 2.13. Where a release renames one of them, the slower or narrower way below takes
over, and the tests of this file say which.
"""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch


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


def in_compiled_backward() -> bool:
    """Return whether torch's compiled autograd runs the backward pass that is running.

    Without torch's answer it is taken not to, and hidden tables would learn nothing under it.
    """
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "in_compiled_autograd_region", False))


def in_transform(x: Tensor) -> bool:
    """Return whether x is seen through `torch.func.vmap`, `grad` and the like.

    Without torch's answer it is taken not to be, and torch's own error follows.
    """
    functorch = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return wrapped is not None and bool(wrapped(x))


def is_traced(x: Tensor) -> bool:
    """Return whether operations on x are recorded, or give shapes without numbers.

    By a compiler, torch.jit.trace, make_fx, FakeTensorMode or the meta device: compiled code, which
    takes addresses, would be missing in the record, or crash.

    Without torch's answer only a compiler, torch.jit.trace and subclasses of Tensor are known.
    """
    if torch.compiler.is_compiling():
        return True
    if torch.jit.is_tracing() or x.is_meta or type(x) not in (Tensor, nn.Parameter):
        return True
    mode_of = getattr(torch._C, "_get_dispatch_mode", None)
    keys = getattr(torch._C, "_TorchDispatchModeKey", None)
    if mode_of is None or keys is None:
        return False
    return any(mode_of(key) is not None for key in (keys.FAKE, keys.PROXY))


def is_fake(x: Tensor) -> bool:
    """Return whether x has a shape and no numbers, as under FakeTensorMode or on the meta device.

    Without torch's answer only the meta device is known.
    """
    subclasses = getattr(torch, "_subclasses", None)
    fake = getattr(subclasses, "FakeTensor", ())
    return x.is_meta or isinstance(x, fake)


def outside_modes() -> AbstractContextManager[object]:
    """Return a context in which torch computes numbers although somebody records or fakes them.

    Without torch's own nothing changes, and a self test of kernels under such a mode fails.
    """
    outside = getattr(_python_dispatch, "_disable_current_modes", nullcontext)
    return outside()


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context without autocast, which torch refuses to name on the meta device."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


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
