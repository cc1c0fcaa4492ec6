"""Differentiable collectives along the sequence dimension: split, all-gather, reduce-scatter.

Each rank has a segment of the same number of neighbouring tokens: x is [batch, length / ranks, ...]
where it is split and [batch, length, ...] where it is whole. All ranks of the group must call these
together, in backward as well.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from memshard.models.context import Context
from memshard.parallel import compat


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return all segments in order; backward sums the ranks' gradients of the local one."""
    return _Gather.apply(x, group)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the local segment of the sum of all ranks' whole sequences; backward gathers."""
    return _ReduceScatter.apply(x, group)


def split(x: Tensor, group: dist.ProcessGroup, scale: float = 1.0) -> Tensor:
    """Return the local segment of a sequence that is the same on all ranks.

    Backward gathers the gradient of the whole sequence and multiplies it by `scale`.
    """
    return _Split.apply(x, group, scale)


def local_segment(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return a view of the local segment of a whole sequence, without communication."""
    return x.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)]


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return all segments in order, without gradient."""
    ranks = dist.get_world_size(group)
    segments = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    compat.all_gather_single(segments, x.contiguous(), group)
    # all_gather puts ranks first; sequences have them inside, between batch and tokens.
    return segments.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1, 2)


def fill_up(
    tokens: Tensor, ctx: Context, group: dist.ProcessGroup
) -> tuple[Tensor, Context, Tensor | None]:
    """Pad a sequence at its end until the ranks' segments are equal.

    Return padded tokens and context, and where tokens are real, None for everywhere. A context
    without padding stays so: no token before the end sees what is appended.
    """
    missing = -tokens.shape[1] % dist.get_world_size(group)
    real = ctx.padding
    if missing:
        real = F.pad(
            torch.ones_like(tokens, dtype=torch.bool) if real is None else real, (0, missing)
        )
        # Token 0 at position 0 is always in the vocabulary and in the table of positions.
        tokens, positions = F.pad(tokens, (0, missing)), F.pad(ctx.positions, (0, missing))
        documents = None if ctx.documents is None else F.pad(ctx.documents, (0, missing))
        window = None if ctx.window is None else F.pad(ctx.window, (0, 0, 0, missing), value=-1)
        ctx = replace(
            ctx,
            positions=positions,
            documents=documents,
            padding=None if ctx.padding is None else real,
            padding_tokens=missing,
            window=window,
        )
    return tokens, ctx, real


def _summed_segment(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    # reduce_scatter deals out the first dim, so the segments go before the batch.
    segments = x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    segment = torch.empty_like(segments[0])
    compat.reduce_scatter_single(segment, segments.flatten(0, 1), group)
    return segment


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return _summed_segment(gradient, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return _summed_segment(x, group)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gathered(gradient, ctx.group), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, scale):  # type: ignore[no-untyped-def]
        ctx.group, ctx.scale = group, scale
        return local_segment(x, group).contiguous()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        whole = gathered(gradient, ctx.group)
        # The copy is saved where nothing is to be scaled.
        return (whole if ctx.scale == 1 else whole * ctx.scale), None, None
