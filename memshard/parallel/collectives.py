"""Sums and exchanges over ranks; without a process group they are the identity."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.parallel import compat


@dataclass
class Traffic:
    """Bytes that this rank has sent to others.

    reads: for reads, their sums and gradients; replicas: to sum row gradients over replicas.
    seconds: time spent exchanging reads on CPU, where an exchange is over when its call returns;
    includes time spent waiting for slower ranks.
    """

    reads: int = 0
    replicas: int = 0
    seconds: float = 0.0


def all_sum(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of x over the ranks of a group (default: all), without gradient."""
    if not dist.is_initialized():
        return x
    # A copy: all_reduce writes into its argument, and takes only contiguous ones.
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_rows(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return every rank's x, [rows, ...], whose numbers of rows may differ."""
    rows = share_count(len(x), group, x.device)
    # all_gather wants equal shapes, so all send as many rows as the longest.
    padded = x.new_zeros(max(rows), *x.shape[1:])
    padded[: len(x)] = x
    gathered = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(gathered, padded, group=group)
    return [part[:length] for part, length in zip(gathered, rows, strict=True)]


def broadcast_from_rank0(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def set_timeout(seconds: float, but: dist.ProcessGroup | None = None) -> None:
    """From the next collective on, let each wait this long for a rank. but: a group left out."""
    for group in compat.process_groups() if dist.is_initialized() else ():
        if group is not but:
            compat.set_timeout(group, seconds)


def differentiable_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of x over the ranks; backward sums the ranks' gradients."""
    return _AllReduce.apply(x, group)


def exchange(
    x: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup,
    traffic: Traffic | None = None,
) -> Tensor:
    """Send the next send[r] rows of x to each rank r and receive receive[r] rows; differentiable.

    x: [sum(send), ...]; returns [sum(receive), ...]. All ranks of the group must take part, in
    backward as well. traffic: counts the bytes sent.
    """
    # Backward sends each row's gradient to where the row came from: send and receive change places.
    return _Exchange.apply(x, list(send), list(receive), group, traffic)


def share_count(count: int | Tensor, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """Return every rank's count. device: used, and waited for, where the group takes no tensors in
    host memory, or where counts are numbers on it, on all ranks.
    """
    ranks = dist.get_world_size(group)
    local = (
        count.repeat(ranks)
        if isinstance(count, Tensor)
        else torch.full((ranks,), count, device=host_or(device, group))
    )
    return exchange(local, [1] * ranks, [1] * ranks, group).tolist()


def share_sizes(sizes: Tensor, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """Return how many rows this rank sends to each rank, and receives from it. sizes: [ranks], the
    first of the two. Waits for the device, once.
    """
    ones = [1] * len(sizes)
    ours, theirs = torch.stack((sizes, exchange(sizes, ones, ones, group))).tolist()
    return ours, theirs


def host_or(device: torch.device, group: dist.ProcessGroup | None = None) -> torch.device:
    """Return where to put numbers that ranks exchange and that no device has computed: host memory,
    which no device has to be waited for, or `device` where the group (default: all) takes nothing
    else.
    """
    return torch.device("cpu") if compat.takes(group, "cpu") else device


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
    def forward(ctx, x, send, receive, group, traffic):  # type: ignore[no-untyped-def]
        ctx.send, ctx.receive, ctx.group, ctx.traffic = send, receive, group, traffic
        return _all_to_all(x, send, receive, group, traffic)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return (
            _all_to_all(gradient, ctx.receive, ctx.send, ctx.group, ctx.traffic),
            None,
            None,
            None,
            None,
        )


def _all_to_all(
    x: Tensor,
    send: list[int],
    receive: list[int],
    group: dist.ProcessGroup,
    traffic: Traffic | None,
) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    begun = time.perf_counter()
    try:
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    except RuntimeError as error:
        error.add_note(
            "All processes that split a table read it at the same time, in evaluation as well: if "
            "none has ended, one may have called the model alone."
        )
        raise
    if traffic is not None:
        traffic.seconds += time.perf_counter() - begun
        # What a rank sends to itself is a copy in its memory.
        to_others = sum(send) - send[dist.get_rank(group)]
        traffic.reads += to_others * math.prod(x.shape[1:]) * x.element_size()
    return out
