"""Checks that decide, once for all ranks, whether a step counts."""

from collections.abc import Iterable, Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.memory.table import ValueTable


def gradients_finite(norm: Tensor, tables: Iterable[ValueTable]) -> Tensor:
    """Return whether this rank's dense gradient and the reads collected for its tables are finite,
    as one bool on the device.
    """
    anchors = [table.anchor.grad for table in tables if table.anchor.grad is not None]
    # The numbers of tables in host memory are filled in: a copy would wait for the device.
    sums = [
        grad.sum().to(norm) if grad.device == norm.device else norm.new_full((), float(grad.sum()))
        for grad in anchors
    ]
    return torch.stack([norm.view(()), *sums]).isfinite().all()


def all_reduce_verdict(
    loss: Tensor, norm: Tensor, *flags: Tensor | bool
) -> tuple[float, float, list[bool]]:
    """Sum the loss and OR the flags over all ranks, with one all-reduce and one device sync, which
    also brings the norm, the same on all of them, to the host.
    """
    # Python values are filled in: copying them to the device would wait for it a second time.
    # fp64 for all: a flag is 0 or 1, and a sum of losses must not depend on the number of ranks.
    values = (
        value.double()
        if isinstance(value, Tensor)
        else loss.new_full((), value, dtype=torch.float64)
        for value in (loss, *flags)
    )
    verdict = torch.stack([*values])
    if dist.is_initialized():
        dist.all_reduce(verdict)
    total, *votes, length = torch.cat((verdict, norm.double().view(1))).tolist()
    return total, length, [bool(vote) for vote in votes]


def is_spike(loss: float, recent: Sequence[float], threshold: float) -> bool:
    """Return whether a loss exceeds the recent ones by more than
    `threshold` robust standard deviations.

    The deviation is 1.4826 times the median distance from the median (equal to the standard
    deviation of a normal distribution), so that earlier spikes do not hide the next. It counts as
    at least 1 % of the median, so that noise of a loss that hardly moves is no spike.
    """
    middle = median(recent)
    deviation = 1.4826 * median(abs(value - middle) for value in recent)
    return loss > middle + threshold * max(deviation, 0.01 * abs(middle))
