"""Pieces of a sequence between the ranks of a group: split, gathered, and summed on the way;
differentiable.

Each rank holds the same number of neighbouring tokens: x is [batch, length / ranks, ...] where it
is split and [batch, length, ...] where it is whole. All ranks of the group must call these
together, backward too.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from memshard.models.context import Context


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' pieces in order; backward sums the ranks' gradients of this rank's piece."""
    return _Gather.apply(x, group)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's piece of the sum of all ranks' whole sequences; backward gathers."""
    return _ReduceScatter.apply(x, group)


def split(x: Tensor, group: dist.ProcessGroup, scale: float = 1.0) -> Tensor:
    """This rank's piece of what is the same on all ranks; backward gathers the gradient of the
    whole and multiplies it by `scale`.
    """
    return _Split.apply(x, group, scale)


def own_piece(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A view of this rank's piece of a whole sequence, without communication."""
    return x.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)]


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' pieces in order, without gradient."""
    ranks = dist.get_world_size(group)
    pieces = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    dist.all_gather_single(pieces, x.contiguous(), group=group)
    return pieces.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1, 2)


def fill_up(
    tokens: Tensor, ctx: Context, group: dist.ProcessGroup
) -> tuple[Tensor, Context, Tensor | None]:
    """Tokens and facts of a sequence padded at its end until the ranks' pieces are equal, and where
    tokens are real, None for everywhere.

    The context's own padding is left out where it was: nobody before the end sees it.
    """
    missing = -tokens.shape[1] % dist.get_world_size(group)
    real = ctx.padding
    if missing:
        real = F.pad(
            torch.ones_like(tokens, dtype=torch.bool) if real is None else real, (0, missing)
        )
        tokens, positions = F.pad(tokens, (0, missing)), F.pad(ctx.positions, (0, missing))
        documents = None if ctx.documents is None else F.pad(ctx.documents, (0, missing))
        ctx = replace(
            ctx,
            positions=positions,
            documents=documents,
            padding=None if ctx.padding is None else real,
            padding_tokens=missing,
        )
    return tokens, ctx, real


def _summed_piece(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    pieces = x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    piece = torch.empty_like(pieces[0])
    dist.reduce_scatter_single(piece, pieces.flatten(0, 1), group=group)
    return piece


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return _summed_piece(gradient, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return _summed_piece(x, group)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gathered(gradient, ctx.group), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, scale):  # type: ignore[no-untyped-def]
        ctx.group, ctx.scale = group, scale
        return own_piece(x, group).contiguous()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        whole = gathered(gradient, ctx.group)
        return (whole if ctx.scale == 1 else whole * ctx.scale), None, None
