"""Product-key search in Triton, launched by triton_lookup.py: from queries to rows and weights.

Scores exist only in tiles. A score and its sub-key make one integer that is ordered as the score
is, higher for the lower index, so no two are equal, and any way to the k highest gives the ties in
the order that `product_topk` documents.
"""

import triton
import triton.language as tl

from memshard.models.kernels.triton_topk import larger, largest


@triton.jit
def turned(bits):
    """Return fp32 bits as integers in the order of the numbers, or such integers as bits."""
    # Numbers below 0 have descending bits.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def packed(score, index):
    """Return score and index as one int64, above -2^63 also where the score is NaN."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals 0
    return (turned(bits).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def score_of(pack):
    """Return the score of what `packed` made."""
    return turned((pack >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(pack):
    """Return the index of what `packed` made."""
    return 0x7FFFFFFF - (pack & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def bf16_parts(x, PARTS: tl.constexpr):
    """Return two bf16 numbers of which x is the sum, to 16 bits of mantissa, as PARTS."""
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return high.to(PARTS), low.to(PARTS)


@triton.jit
def add_products(sums, x, y, PRECISION: tl.constexpr, PARTS: tl.constexpr):
    """Return sums + x @ y, of fp32 [M, D] and [D, N]. PARTS: bf16, or fp32 in the interpreter."""
    if PRECISION == "bf16x3":
        x1, x2 = bf16_parts(x, PARTS)
        y1, y2 = bf16_parts(y, PARTS)
        # The product of both rests is below the 16 bits.
        return tl.dot(x1, y1, tl.dot(x1, y2, tl.dot(x2, y1, sums)))
    elif PRECISION == "tf32":
        return tl.dot(x, y, sums, input_precision="tf32")
    else:
        return tl.dot(x, y, sums, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def best_sub_keys(
    queries,
    sub_keys,
    best,
    tokens,
    heads,
    keys,
    half,
    k,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
):
    """Store in best[token, head, side] the k best sub-keys of a half, packed, best first.

    queries: [tokens, heads, 2, half]; sub_keys: [heads, 2, keys, half]; best: [tokens, heads, 2, k]
    int64. K: k or the next power of two, at most KEYS.
    """
    head_side = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    bag = token * (2 * heads) + head_side
    first_key = head_side.to(tl.int64) * keys
    # Ascending, so that it meets a tile's descending ones without being turned round.
    kept = tl.full((TOKENS, K), -(1 << 63), tl.int64)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        scores = tl.zeros((TOKENS, KEYS), tl.float32)
        for column in range(0, half, WIDTH):
            columns = column + tl.arange(0, WIDTH)
            x = tl.load(
                queries + bag[:, None] * half + columns[None, :],
                mask=(token < tokens)[:, None] & (columns < half)[None, :],
                other=0.0,
            ).to(tl.float32)
            y = tl.load(
                sub_keys + (first_key + key)[None, :] * half + columns[:, None],
                mask=(key < keys)[None, :] & (columns < half)[:, None],
                other=0.0,
            ).to(tl.float32)
            scores = add_products(scores, x, y, PRECISION, PARTS)
        index = tl.broadcast_to(key[None, :], (TOKENS, KEYS))
        tile = largest(tl.where(index < keys, packed(scores, index), -(1 << 63)), K)
        kept = larger(kept, tile)
    rank = K - 1 - tl.arange(0, K)
    tl.store(
        best + bag[:, None] * k + rank[None, :],
        kept,
        mask=(token < tokens)[:, None] & (rank < k)[None, :],
    )


@triton.jit(do_not_specialize=["bags"])
def best_pairs(
    best,
    ranks,
    weights,
    rows,
    bags,
    keys,
    k,
    pairs,
    WEIGHTING: tl.constexpr,
    BAGS: tl.constexpr,
    PAIRS: tl.constexpr,
    K: tl.constexpr,
):
    """Store in rows[bag] and weights[bag] the k best pairs of sub-keys, best first.

    best: [bags, 2, k], as `best_sub_keys` stores it; ranks: [2, pairs], those that can win; rows
    are in the order of `slot_rows`. A bag is a head of a token.
    """
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    firsts = (best + bag * (2 * k))[:, None]
    seconds = firsts + k
    there = (bag < bags)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    mask = there & (pair < pairs)
    x = tl.load(ranks + pair, mask=pair < pairs, other=0)
    y = tl.load(ranks + pairs + pair, mask=pair < pairs, other=0)
    sums = score_of(tl.load(firsts + x, mask=mask, other=0)) + score_of(
        tl.load(seconds + y, mask=mask, other=0)
    )
    # Pairs are numbered in the order of ties.
    numbers = tl.broadcast_to(pair, (BAGS, PAIRS))
    top = largest(tl.where(mask, packed(sums, numbers), -(1 << 63)), K)
    rank = tl.arange(0, K)[None, :]
    mask = there & (rank < k)
    pair, scores = index_of(top), score_of(top)
    x = tl.load(ranks + pair, mask=mask, other=0)
    y = tl.load(ranks + pairs + pair, mask=mask, other=0)
    i1 = index_of(tl.load(firsts + x, mask=mask, other=0))
    i2 = index_of(tl.load(seconds + y, mask=mask, other=0))
    if WEIGHTING == "softmax":
        highest = tl.max(tl.where(mask, scores, float("-inf")), 1)[:, None]
        parts = tl.where(mask, tl.exp(scores - highest), 0.0)
        weight = parts / tl.where(there, tl.sum(parts, 1)[:, None], 1.0)
    elif WEIGHTING == "sigmoid":
        weight = tl.sigmoid(scores) / k
    else:
        weight = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL) / k
    out = bag[:, None] * k + rank
    tl.store(weights + out, weight, mask=mask)
    tl.store(rows + out, (i1 + i2) % keys * keys + i1, mask=mask)
