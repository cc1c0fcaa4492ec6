"""What may stop a run or spoil a step, decided once for all ranks."""

from collections.abc import Iterable, Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.memory.table import ValueTable


def gradients_finite(norm: Tensor, tables: Iterable[ValueTable]) -> Tensor:
    """Whether this rank's dense gradient and the reads it keeps for its tables are finite: one
    truth value, on the device.
    """
    anchors = [table.anchor.grad.to(norm) for table in tables if table.anchor.grad is not None]
    return torch.cat([norm.view(1), *anchors]).isfinite().all()


def agree(loss: Tensor, *flags: Tensor | bool) -> tuple[float, list[bool]]:
    """The sum of the ranks' losses, and each flag, true if it is set on any rank: one small
    all-reduce, one wait for the device.
    """
    # What is on the CPU is filled in: copying it would wait for the device once more.
    found = (
        value.double()
        if isinstance(value, Tensor)
        else loss.new_full((), value, dtype=torch.float64)
        for value in (loss, *flags)
    )
    verdict = torch.stack([*found])
    if dist.is_initialized():
        dist.all_reduce(verdict)
    total, *votes = verdict.tolist()
    return total, [bool(vote) for vote in votes]


def is_spike(loss: float, recent: Sequence[float], threshold: float) -> bool:
    """Whether a loss stands out above the recent ones by more than `threshold` robust standard
    deviations.

    The deviation is 1.4826 times the median distance from the median, what a normal distribution
    has, so that earlier spikes do not hide the next; at least 1 % of the median, so that a loss
    that hardly moves is not called a spike for its noise.
    """
    middle = median(recent)
    deviation = 1.4826 * median(abs(value - middle) for value in recent)
    return loss > middle + threshold * max(deviation, 0.01 * abs(middle))
