"""Sums and exchanges over ranks; without a process group they are the identity."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_sum(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of x over the ranks of a group (default: all), without gradient; x is not changed."""
    if not dist.is_initialized():
        return x
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def differentiable_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over the ranks; its gradient is the sum of theirs."""
    return _AllReduce.apply(x, group)


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send send[r] leading rows of x to each rank r in turn, get receive[r] from it; differentiable.

    x: [sum(send), ...]; returns [sum(receive), ...]. All ranks of the group must take part, backward too.
    """
    return _Exchange.apply(x, list(send), list(receive), group)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return all_sum(x, group)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return all_sum(gradient, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send, receive, group):  # type: ignore[no-untyped-def]
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return _all_to_all(gradient, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out
