"""Fast weights of one segment of a text, while other ranks have its other segments.

A segment changes the state by an affine map, S -> through S + written, which can be computed
without knowing S; what its tokens read is affine as well, y = y0 + carried S. The maps of all
segments together give the states between them. Letters as in `chunks`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.fast_weights.delta_rule import delta_rule
from memshard.models.fast_weights.sum_rule import sum_rule

Rule = Callable[..., tuple[Tensor, Tensor]]


class Neighbours(Protocol):
    """The ranks that have a sequence's other segments. All of them must call the same methods in
    the same order, in forward and in backward.
    """

    def rows_before(self, x: Tensor, count: int) -> Tensor:
        """Return the `count` rows before this segment, [B, count, ...], 0 before the text begins.
        x: [B, L, ...], the rows of this segment.
        """

    def states(
        self, through: Tensor, written: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the states before this segment and after the last one, [B, H, D, M].

        through, written: the map of this segment, [B, H, D, D] and [B, H, D, M]. first: the state
        before the first segment, the same on all ranks; None for zero.
        """


def delta_rule_of_segment(neighbours: Neighbours) -> Rule:
    """Return a `delta_rule` for this rank's segment. It takes the state before the first segment
    and returns that after the last one.
    """

    def rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        state: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        dtype, width = torch.promote_types(v.dtype, torch.float32), v.shape[-1]
        # D more columns of the state start as the identity, and values of 0 are written to them: at
        # the end they are the map `through`.
        identity = torch.eye(q.shape[-1], dtype=dtype, device=q.device).expand(*q.shape[:2], -1, -1)
        start = F.pad(identity, (width, 0))
        read, end = delta_rule(
            q, k, F.pad(v.to(dtype), (0, q.shape[-1])), beta, start, resets=resets
        )
        before, after = neighbours.states(end[..., width:], end[..., :width], state)
        # Reads of the extra columns are q^T times the map so far, so that times the true state
        # before the segment is what was missing from the reads.
        return _joined(read[..., :width], read[..., width:], before).to(v.dtype), after

    return rule


def sum_rule_of_segment(neighbours: Neighbours) -> Rule:
    """Return a `sum_rule` for this rank's segment; see `delta_rule_of_segment`."""

    def rule(
        q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(v.dtype, torch.float32)
        read, written = sum_rule(q, k, v.to(dtype), resets=resets)
        # The sum rule leaves the state as it is: the map is the identity, and a query
        # reads it directly.
        carried, through = (
            q.to(dtype),
            torch.eye(q.shape[-1], dtype=dtype, device=q.device).expand(*q.shape[:2], -1, -1),
        )
        if resets is not None:
            # From a segment's first reset on, nothing of the state before it is left.
            kept = resets.cumsum(1) == 0
            carried, through = (
                carried * kept[:, None, :, None],
                through * kept[:, -1, None, None, None],
            )
        before, after = neighbours.states(through, written, state)
        return _joined(read, carried, before).to(v.dtype), after

    return rule


def _joined(read: Tensor, carried: Tensor, before: Tensor) -> Tensor:
    # States are fp32; autocast would round them to half precision for the product.
    with torch.autocast(read.device.type, enabled=False):
        return read + carried @ before
