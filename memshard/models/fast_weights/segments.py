"""Fast weights of one piece of a text, whose earlier pieces are elsewhere.

What a piece does to the state is an affine map, S -> through S + written, found without knowing S;
so is what its tokens read, y = y0 + carried S. Whoever knows the maps of all pieces finds the
states between them. The letters are those of `chunks`.
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
    """Whoever has the other pieces. All must ask for the same things in the same order, backward
    too.
    """

    def rows_before(self, x: Tensor, count: int) -> Tensor:
        """The `count` rows before this piece, [B, count, ...], 0 where the text begins later. x:
        [B, L, ...] of this piece.
        """

    def states(
        self, through: Tensor, written: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The states before this piece and after the last one, [B, H, D, M], from the map of this
        piece, [B, H, D, D] and [B, H, D, M], and the state before the first piece, the same for
        all, None for zero.
        """


def delta_in_pieces(neighbours: Neighbours) -> Rule:
    """`delta_rule` of a piece. `state` is that before the first piece, the returned one that after
    the last.
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
        # D columns more of the state, which begin as the identity and to which nothing is written,
        # become the map.
        identity = torch.eye(q.shape[-1], dtype=dtype, device=q.device).expand(*q.shape[:2], -1, -1)
        start = F.pad(identity, (width, 0))
        read, end = delta_rule(
            q, k, F.pad(v.to(dtype), (0, q.shape[-1])), beta, start, resets=resets
        )
        before, after = neighbours.states(end[..., width:], end[..., :width], state)
        return _joined(read[..., :width], read[..., width:], before).to(v.dtype), after

    return rule


def sums_in_pieces(neighbours: Neighbours) -> Rule:
    """`sum_rule` of a piece, in the same way."""

    def rule(
        q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(v.dtype, torch.float32)
        read, written = sum_rule(q, k, v.to(dtype), resets=resets)
        carried, through = (
            q.to(dtype),
            torch.eye(q.shape[-1], dtype=dtype, device=q.device).expand(*q.shape[:2], -1, -1),
        )
        if resets is not None:
            kept = resets.cumsum(1) == 0
            carried, through = (
                carried * kept[:, None, :, None],
                through * kept[:, -1, None, None, None],
            )
        before, after = neighbours.states(through, written, state)
        return _joined(read, carried, before).to(v.dtype), after

    return rule


def _joined(read: Tensor, carried: Tensor, before: Tensor) -> Tensor:
    with torch.autocast(read.device.type, enabled=False):
        return read + carried @ before
