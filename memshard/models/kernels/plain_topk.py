"""The search for the best product scores in plain torch, which compiled searches must equal."""

from functools import cache

import torch
from torch import Tensor


def product_search(first: Tensor, second: Tensor, k: int) -> Tensor:
    """Return i1 and i2 of the k highest first[i1] + second[i2], stacked: [2, ..., k] int32.

    first, second: [..., keys]. Best first; ties in the order that `product_topk` documents.
    """
    i1, i2 = ranked_topk(first, k), ranked_topk(second, k)
    x, y = (ranks.to(first.device) for ranks in candidate_pairs(k))
    # Pairs number ranks, not sub-keys: 119 sums at k = 32, whatever the number of keys.
    sums = first.gather(-1, i1).index_select(-1, x) + second.gather(-1, i2).index_select(-1, y)
    chosen = ranked_topk(sums, k)
    return torch.stack((i1.gather(-1, x[chosen]), i2.gather(-1, y[chosen]))).int()


@cache
def candidate_pairs(k: int) -> tuple[Tensor, Tensor]:
    """Return the pairs of ranks (x, y), from 0, that can be among the k best sums.

    A pair is beaten by the (x + 1)(y + 1) - 1 pairs of lower or equal ranks, so (x + 1)(y + 1) <= k
    for all that count: 119 of 1,024 pairs at k = 32. In lexicographic order, which is that of ties.
    """
    # Named, since the cache serves all devices: made under torch.device("meta"), it would keep
    # numbers without values.
    ranks = torch.arange(1, k + 1, device="cpu")
    x, y = torch.nonzero(ranks[:, None] * ranks <= k, as_tuple=True)
    return x, y


def ranked_topk(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k highest scores, best first, equal ones by index.

    scores: [..., n], without NaN; returns [..., k]. torch.topk leaves the order of ties open. One
    score more than asked for shows where they matter; those rows (one in some thousands, in fp32)
    are sorted in full.
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
