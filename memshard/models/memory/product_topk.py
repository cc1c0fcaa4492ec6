"""Exact top-k over the keys x keys sums of two sets of scores, with a fixed order of ties."""

from functools import partial

import torch
from torch import Tensor

from memshard.models import compat
from memshard.models.kernels.backend import search_for
from memshard.models.once import differentiable_once
from memshard.models.recompute.replay import Replay, run_once


def product_topk(
    first: Tensor, second: Tensor, k: int, replay: Replay | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k slots with the highest first[i1] + second[i2] (Lample et al. 2019, section 3.2).

    first, second: [..., keys] scores of the sub-keys. Returns scores, i1, i2, each [..., k], best
    first. Gradients flow to the selected entries of `first` and `second`.

    Equal sums are ordered by rank of i1 in its half, then of i2; ranks order by score, then by
    index. Where sub-keys themselves tie this is the lowest slot number i1 * keys + i2. A repeated
    pass searches only once.
    """
    i1, i2 = run_once(replay, partial(_search, first.detach(), second.detach(), k)).long()
    if compat.is_traced(first):
        # A compiler sees by itself that the indices are enough for backward.
        return first.gather(-1, i1) + second.gather(-1, i2), i1, i2
    return _PickedSums.apply(first, second, i1, i2), i1, i2


@torch.no_grad()
def _search(first: Tensor, second: Tensor, k: int) -> Tensor:
    return search_for(first)(first, second, k)


class _PickedSums(torch.autograd.Function):
    """apply(first, second, i1, i2): first[i1] + second[i2].

    gather would keep all scores for backward, 8 heads keys bytes a token; this keeps the indices,
    in int32.
    """

    @staticmethod
    def forward(ctx, first, second, i1, i2):  # type: ignore[no-untyped-def]
        ctx.shape = first.shape
        ctx.save_for_backward(i1.int(), i2.int())
        return first.gather(-1, i1) + second.gather(-1, i2)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, gradient):  # type: ignore[no-untyped-def]
        # scatter_add_, since one sub-key may take part in many of the k pairs.
        scattered = (
            gradient.new_zeros(ctx.shape).scatter_add_(-1, i.long(), gradient) for i in saved
        )
        return *scattered, None, None
