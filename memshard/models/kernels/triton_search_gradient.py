"""Gradients of a product-key search in Triton, launched by triton_lookup.py."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["bags"])
def merge_reads(
    rows,
    weights,
    upstream,
    sub_keys,
    gradients,
    firsts,
    lasts,
    bags,
    heads,
    keys,
    k,
    WEIGHTING: tl.constexpr,
    BAGS: tl.constexpr,
    K: tl.constexpr,
):
    """Sum the gradients of the scores of a bag, a head of a token, over the sub-keys they contain.

    rows, weights, upstream: [bags, k], what `best_pairs` stored and the gradient of the weights.
    Stores, for each bag and side, the distinct sub-keys, as rows of [heads * 2 * keys], and the sum
    for each: [bags, 2, k], from firsts [bags, 2] to lasts. What follows has row heads * 2 * keys
    and 0. Of 32 pairs' two times 32 sub-keys about a third are distinct.
    """
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    rank = tl.arange(0, K)
    mask = (bag < bags)[:, None] & (rank < k)[None, :]
    place = bag[:, None] * k + rank[None, :]
    row = tl.load(rows + place, mask=mask, other=0)
    weight = tl.load(weights + place, mask=mask, other=0.0)
    slope = tl.load(upstream + place, mask=mask, other=0.0)
    if WEIGHTING == "softmax":
        slope = weight * (slope - tl.sum(weight * slope, 1)[:, None])
    elif WEIGHTING == "sigmoid":
        slope = slope * weight * (1 - k * weight)
    else:
        slope = tl.where(weight > 0, slope / k, 0.0)
    head = bag % heads
    first = row % keys
    for side in tl.static_range(2):
        index = first if side == 0 else (row // keys + keys - first) % keys
        same = (index[:, :, None] == index[:, None, :]) & mask[:, None, :]
        sums = tl.sum(tl.where(same, slope[:, None, :], 0.0), 2)
        earlier = same & (rank[None, None, :] < rank[None, :, None])
        distinct = mask & (tl.sum(earlier.to(tl.int32), 2) == 0)
        number = tl.cumsum(distinct.to(tl.int32), 1) - 1
        count = tl.sum(distinct.to(tl.int32), 1)
        start = (bag * 2 + side) * k
        out = start[:, None] + number
        table_row = ((head * 2 + side) * keys)[:, None] + index
        tl.store(sub_keys + out, table_row.to(sub_keys.dtype.element_ty), mask=distinct)
        tl.store(gradients + out, sums, mask=distinct)
        rest = start[:, None] + rank[None, :]
        unused = mask & (rank[None, :] >= count[:, None])
        none = (tl.zeros((BAGS, K), tl.int32) + heads * 2 * keys).to(sub_keys.dtype.element_ty)
        tl.store(sub_keys + rest, none, mask=unused)
        tl.store(gradients + rest, tl.zeros((BAGS, K), tl.float32), mask=unused)
        tl.store(firsts + bag * 2 + side, start, mask=bag < bags)
        tl.store(lasts + bag * 2 + side, start + count, mask=bag < bags)
