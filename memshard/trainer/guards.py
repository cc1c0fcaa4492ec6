"""What may stop a run or a step, decided once for all ranks."""

import math
import signal
from collections.abc import Iterable
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.memory.table import ValueTable


def gradients_finite(norm: Tensor, tables: Iterable[ValueTable]) -> bool:
    """Whether this rank's dense gradient and the reads it keeps for its tables are finite."""
    anchors = [table.anchor.grad for table in tables if table.anchor.grad is not None]
    return math.isfinite(float(norm)) and all(math.isfinite(float(grad)) for grad in anchors)


def agree(*flags: bool, device: torch.device) -> list[bool]:
    """Each flag, true if it is set on any rank: one small all-reduce."""
    if not dist.is_initialized():
        return list(flags)
    verdict = torch.tensor([float(flag) for flag in flags], device=device)
    dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
    return [bool(value) for value in verdict.tolist()]


class StopSignal:
    """Set by Ctrl-C or SIGTERM; a second Ctrl-C aborts at once. Use as a context manager around the loop."""

    def __init__(self) -> None:
        self.received = False
        self._interrupts = 0

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Launchers pass a Ctrl-C on and may add a SIGTERM of their own: only SIGINT counts as impatience.
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.received = True
