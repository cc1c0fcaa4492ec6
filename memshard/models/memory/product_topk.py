"""Exact top-k over keys x keys product scores from keys + keys of them, with a fixed order of
ties.
"""

from functools import cache, partial

import torch
from torch import Tensor

from memshard.models.kernels.backend import search_for
from memshard.models.recompute.replay import Replay, run_once


def product_topk(
    first: Tensor, second: Tensor, k: int, replay: Replay | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k slots with the highest first[i1] + second[i2] (Lample et al. 2019, section 3.2).

    first, second: [..., keys] scores of the sub-keys. Returns scores, i1, i2, each [..., k], best
    first. Gradients flow to the selected entries of `first` and `second`.

    Equal sums are ordered by rank of i1 in its half, then of i2; ranks order by score, then by
    index. Where sub-keys themselves tie this is the lowest slot number i1 * keys + i2. A repeated
    pass searches only once.
    """
    i1, i2 = run_once(replay, partial(_search, first.detach(), second.detach(), k)).long()
    return _PickedSums.apply(first, second, i1, i2), i1, i2


@torch.no_grad()
def _search(first: Tensor, second: Tensor, k: int) -> Tensor:
    """i1 and i2 of the best, stacked: [2, ..., k] int32."""
    compiled = search_for(first)
    return (
        _search_plain(first, second, k)
        if compiled is None
        else compiled(first, second, _candidates(k), k)
    )


def _search_plain(first: Tensor, second: Tensor, k: int) -> Tensor:
    i1, i2 = ranked_topk(first, k), ranked_topk(second, k)
    x, y = (ranks.to(first.device) for ranks in _candidates(k))
    sums = first.gather(-1, i1).index_select(-1, x) + second.gather(-1, i2).index_select(-1, y)
    chosen = ranked_topk(sums, k)
    return torch.stack((i1.gather(-1, x[chosen]), i2.gather(-1, y[chosen]))).int()


class _PickedSums(torch.autograd.Function):
    """first[i1] + second[i2]. gather would keep all scores for backward, 8 heads keys bytes a
    token; this keeps the indices, in int32.
    """

    @staticmethod
    def forward(ctx, first, second, i1, i2):  # type: ignore[no-untyped-def]
        ctx.shape = first.shape
        ctx.save_for_backward(i1.int(), i2.int())
        return first.gather(-1, i1) + second.gather(-1, i2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        scattered = (
            gradient.new_zeros(ctx.shape).scatter_add_(-1, i.long(), gradient)
            for i in ctx.saved_tensors
        )
        return *scattered, None, None


@cache
def _candidates(k: int) -> tuple[Tensor, Tensor]:
    """Rank pairs (x, y), from 0, that can be among the k best sums: (x + 1)(y + 1) <= k, in
    lexicographic order.

    A pair is beaten by the (x + 1)(y + 1) - 1 pairs of lower or equal ranks: 119 pairs remain of
    1024 at k = 32.
    """
    ranks = torch.arange(1, k + 1, device="cpu")
    x, y = torch.nonzero(ranks[:, None] * ranks <= k, as_tuple=True)
    return x, y


def ranked_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores, best first, equal ones by index. scores: [..., n], without
    NaN; returns [..., k].

    torch.topk leaves the order of ties open. One score more than asked for shows where they matter;
    those rows (one in some thousands, in fp32) are sorted in full.
    """
    values, indices = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    indices = indices[..., :k]
    tied = (values[..., 1:] == values[..., :-1]).any(-1)
    if bool(tied.any()):
        indices = indices.clone()
        indices[tied] = torch.sort(scores[tied], dim=-1, descending=True, stable=True).indices[
            ..., :k
        ]
    return indices
