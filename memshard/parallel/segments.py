"""Sequences in pieces over ranks, for fast weights: each rank has its own tokens from the embedding
to the loss, and whole matrices.

What the others have to know of a piece is small: the affine map by which it changes the fast
weights (`models/fast_weights/segments.py`), and the last rows of convolutions. Every rank gets all
maps and finds the state before its own piece.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memshard.models.context import Context
from memshard.models.layers.adaptive_softmax import AdaptiveHead
from memshard.models.loss import IGNORE, token_losses
from memshard.models.transformer import Transformer
from memshard.parallel.sequence import fill_up, gather, gathered, local_segment


class Pieces:
    """The ranks of a group, each with one of neighbouring pieces of equal length. What they
    exchange stays out of compiled code.
    """

    def __init__(self, ranks: dist.ProcessGroup) -> None:
        self.ranks = ranks

    @torch.compiler.disable
    def rows_before(self, x: Tensor, count: int) -> Tensor:
        """As `Neighbours.rows_before`; pieces may be shorter than `count`."""
        own = x[:, -count:]
        everyone = gather(own, self.ranks) if x.is_floating_point() else gathered(own, self.ranks)
        before = everyone[:, : dist.get_rank(self.ranks) * own.shape[1]][:, -count:]
        return F.pad(before, [0, 0] * (x.ndim - 2) + [count - before.shape[1], 0])

    @torch.compiler.disable
    def states(
        self, through: Tensor, written: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `Neighbours.states`. Each rank's gradient of `first` is a part of it; what ranks make
        of the last state adds up.
        """
        before, after = _States.apply(through, written, first, self.ranks)
        return before, after


class _States(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, through: Tensor, written: Tensor, first: Tensor | None, ranks: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        width = through.shape[-1]
        maps = gathered(torch.cat((through, written), -1)[:, None], ranks).unbind(1)
        state = torch.zeros_like(written) if first is None else first.to(written.dtype, copy=True)
        states = [state]
        with torch.autocast(written.device.type, enabled=False):
            for each in maps:
                state = each[..., :width] @ state + each[..., width:]
                states.append(state)
        before = states[dist.get_rank(ranks)]
        ctx.ranks, ctx.has_first = ranks, first is not None
        ctx.save_for_backward(before, *(each[..., :width] for each in maps))
        return before, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        before, *throughs = ctx.saved_tensors
        rank, width = dist.get_rank(ctx.ranks), before.shape[-1]
        gradients = gathered(torch.cat((d_before, d_after), -1)[:, None], ctx.ranks)
        total = gradients[..., width:].sum(1)
        d_through, d_written = torch.empty_like(throughs[rank]), torch.empty_like(before)
        with torch.autocast(before.device.type, enabled=False):
            for piece in reversed(range(len(throughs))):
                if piece == rank:
                    d_through, d_written = total @ before.mT, total
                total = gradients[:, piece, ..., :width] + throughs[piece].mT @ total
        d_first = None if not ctx.has_first else total if rank == 0 else torch.zeros_like(total)
        return d_through, d_written, d_first, None


def share_sequences(model: Transformer, ranks: dist.ProcessGroup) -> None:
    """Let the ranks of a group have a piece of each sequence. ValueError for mixers that
    cannot.

    The model then returns the logits of this rank's tokens; `piece_losses` has the losses of all.
    """
    if isinstance(model.head, AdaptiveHead):
        raise ValueError(
            "model.adaptive_cutoffs gives a head that needs whole sequences: set parallel.tensor "
            "to 1"
        )
    for block in model.blocks:
        block.mixer.share_sequence(Pieces(ranks))

    def own(tokens: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        tokens, ctx, real = fill_up(tokens, ctx, ranks)
        documents, padding = (
            None if facts is None else local_segment(facts, ranks)
            for facts in (ctx.documents, real)
        )
        return local_segment(tokens, ranks), Context(
            local_segment(ctx.positions, ranks), documents, padding, ctx.random
        )

    model.share_sequence = own


def piece_losses(logits: Tensor, targets: Tensor, ranks: dist.ProcessGroup) -> Tensor:
    """As `models.loss.token_losses`, of all tokens on every rank, from logits of this rank's
    tokens. targets: [batch, length], all.
    """
    length = targets.shape[1]
    targets = F.pad(targets, (0, -length % dist.get_world_size(ranks)), value=IGNORE)
    return _Joined.apply(token_losses(logits, local_segment(targets, ranks)), ranks)[:, :length]


class _Joined(torch.autograd.Function):
    """All ranks' pieces. All have the same loss, of whose gradient each takes that of its own
    piece.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: dist.ProcessGroup) -> Tensor:
        ctx.ranks = ranks
        return gathered(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return local_segment(gradient, ctx.ranks).contiguous(), None
