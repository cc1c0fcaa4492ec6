"""Sequences cut into segments over ranks, for fast weights: each rank has its own tokens from the
embedding to the loss, and whole matrices.

What other ranks must know about a segment is small: the affine map by which it changes the fast
weights (`models/fast_weights/segments.py`), and its last rows for convolutions. Every rank gets all
maps and computes from them the state before its own segment.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from memshard.models.context import Context
from memshard.models.layers.adaptive_softmax import AdaptiveHead
from memshard.models.loss import IGNORE, token_losses
from memshard.models.once import Saved, differentiable_once
from memshard.models.transformer import Transformer
from memshard.parallel.sequence import fill_up, gather, gathered, local_segment


class RankNeighbours:
    """The `Neighbours` of a segment where each rank of a group has one, all of equal length.

    Collectives cannot be compiled together with the layers, so they are left out of graphs.
    """

    def __init__(self, ranks: dist.ProcessGroup) -> None:
        self.ranks = ranks

    @torch.compiler.disable
    def rows_before(self, x: Tensor, count: int) -> Tensor:
        """Do what `Neighbours.rows_before` does; segments may be shorter than `count`."""
        last = x[:, -count:]
        # A convolution of width 4 needs 3 rows, and segments may be shorter than that: rather than
        # ask one neighbour, gather the last rows of all and take the last 3 before ours.
        all_last = gather(last, self.ranks) if x.is_floating_point() else gathered(last, self.ranks)
        before = all_last[:, : dist.get_rank(self.ranks) * last.shape[1]][:, -count:]
        return F.pad(before, [0, 0] * (x.ndim - 2) + [count - before.shape[1], 0])

    @torch.compiler.disable
    def states(
        self, through: Tensor, written: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Do what `Neighbours.states` does. Each rank returns a part of the gradient of `first`,
        and the ranks' gradients of the last state are summed.
        """
        before, after = _States.apply(through, written, first, self.ranks)
        return before, after


class _States(torch.autograd.Function):
    """Segment i maps the state S to A_i S + B_i. Forward computes S_i+1 = A_i S_i + B_i for all
    segments on every rank: maps are small, and one all-gather is cheaper than a chain of sends.

    Backward runs the same recurrence from the end. With G_i the gradient of the state before
    segment i: dB_i = G_i+1, dA_i = G_i+1 S_i^T, G_i = (what rank i's reads add) + A_i^T G_i+1.
    """

    @staticmethod
    def forward(
        ctx: Any, through: Tensor, written: Tensor, first: Tensor | None, ranks: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        width = through.shape[-1]
        maps = gathered(torch.cat((through, written), -1)[:, None], ranks).unbind(1)
        state = torch.zeros_like(written) if first is None else first.to(written.dtype, copy=True)
        states = [state]
        # States add up over the whole sequence; half precision would lose what each segment adds.
        with torch.autocast(written.device.type, enabled=False):
            for segment in maps:
                state = segment[..., :width] @ state + segment[..., width:]
                states.append(state)
        before = states[dist.get_rank(ranks)]
        ctx.ranks, ctx.has_first = ranks, first is not None
        ctx.save_for_backward(before, *(segment[..., :width] for segment in maps))
        return before, state

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: Saved, d_before: Tensor, d_after: Tensor
    ) -> tuple[Tensor | None, ...]:
        before, *throughs = saved
        rank, width = dist.get_rank(ctx.ranks), before.shape[-1]
        gradients = gathered(torch.cat((d_before, d_after), -1)[:, None], ctx.ranks)
        total = gradients[..., width:].sum(1)
        d_through, d_written = torch.empty_like(throughs[rank]), torch.empty_like(before)
        with torch.autocast(before.device.type, enabled=False):
            for segment in reversed(range(len(throughs))):
                if segment == rank:
                    d_through, d_written = total @ before.mT, total
                total = gradients[:, segment, ..., :width] + throughs[segment].mT @ total
        # Other ranks return 0, because gradients along this axis are summed later.
        d_first = None if not ctx.has_first else total if rank == 0 else torch.zeros_like(total)
        return d_through, d_written, d_first, None


def share_sequences(model: Transformer, ranks: dist.ProcessGroup) -> None:
    """Give each rank of a group one segment of every sequence. ValueError for mixers that cannot
    continue from a state.

    The model then returns the logits of this rank's tokens; `segment_losses` computes the losses of
    all tokens from them.
    """
    if isinstance(model.head, AdaptiveHead):
        raise ValueError(
            "model.adaptive_cutoffs gives a head that needs whole sequences: set parallel.tensor "
            "to 1"
        )
    for block in model.blocks:
        block.mixer.share_sequence(RankNeighbours(ranks))

    def local_part(tokens: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        tokens, ctx, real = fill_up(tokens, ctx, ranks)
        documents, padding, window = (
            None if facts is None else local_segment(facts, ranks)
            for facts in (ctx.documents, real, ctx.window)
        )
        return local_segment(tokens, ranks), Context(
            local_segment(ctx.positions, ranks), documents, padding, ctx.random, window=window
        )

    model.share_sequence = local_part


def segment_losses(logits: Tensor, targets: Tensor, ranks: dist.ProcessGroup) -> Tensor:
    """Return the losses of all tokens [batch, length] on every rank, as `models.loss.token_losses`.

    logits: of this rank's segment. targets: [batch, length] of the whole sequences.
    """
    length = targets.shape[1]
    # As `fill_up` pads the tokens; IGNORE has no loss.
    targets = F.pad(targets, (0, -length % dist.get_world_size(ranks)), value=IGNORE)
    return _Joined.apply(token_losses(logits, local_segment(targets, ranks)), ranks)[:, :length]


class _Joined(torch.autograd.Function):
    """All ranks' segments, joined. All ranks have the same loss, so each takes from its gradient
    the part of its own segment.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: dist.ProcessGroup) -> Tensor:
        ctx.ranks = ranks
        return gathered(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return local_segment(gradient, ctx.ranks).contiguous(), None
