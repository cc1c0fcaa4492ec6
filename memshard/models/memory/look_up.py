"""The search from queries to rows and weights that stores no scores, as an autograd function."""

from functools import partial

import torch
from torch import Tensor

from memshard.models.kernels.backend import Lookup
from memshard.models.once import differentiable_once
from memshard.models.recompute.replay import Replay, run_once


def look_up(
    lookup: Lookup,
    queries: Tensor,
    sub_keys: Tensor,
    k: int,
    weighting: str,
    precision: str = "fp32",
    replay: Replay | None = None,
) -> tuple[Tensor, Tensor]:
    """Return rows int64 and weights fp32 of the k best slots of each query, [tokens, heads, k].

    They are those of `half_scores`, `product_topk`, `weigh` and `slot_rows`; gradients flow to
    queries [tokens, heads, key_dim] and sub_keys [heads, 2, keys, half]. A repeated pass searches
    only once. precision: of the scores.
    """
    inputs = queries.detach(), sub_keys.detach()
    search = partial(_search, lookup, *inputs, k, weighting, precision)
    rows, bits = run_once(replay, search)
    weights: Tensor = _Weights.apply(
        queries, sub_keys, rows, bits.view(torch.float32), lookup, weighting
    )
    return rows.long(), weights


@torch.no_grad()
def _search(
    lookup: Lookup, queries: Tensor, sub_keys: Tensor, k: int, weighting: str, precision: str
) -> Tensor:
    return lookup.look_up(queries, sub_keys, k, weighting, precision)


class _Weights(torch.autograd.Function):
    """apply(queries, sub_keys, rows, weights, lookup, weighting): the weights.

    Rows and weights are all of the search that is kept for backward, 8 bytes a read.
    """

    @staticmethod
    def forward(ctx, queries, sub_keys, rows, weights, lookup, weighting):  # type: ignore[no-untyped-def]
        ctx.lookup, ctx.weighting = lookup, weighting
        ctx.save_for_backward(queries, sub_keys, rows, weights)
        return weights.view_as(weights)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, upstream):  # type: ignore[no-untyped-def]
        wanted = ctx.needs_input_grad[:2]
        gradients = ctx.lookup.gradients(*saved, upstream, ctx.weighting, wanted)
        return *gradients, None, None, None, None
