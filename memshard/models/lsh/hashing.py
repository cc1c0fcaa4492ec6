"""Locality-sensitive hashing by random rotations (Andoni et al. 2015): vectors at a small angle
often share a bucket.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from memshard.models.compat import is_traced
from memshard.models.random import fold, normal_rows

_MOST_DIRECTIONS = 128
_ROTATIONS = 0x4C5348
_HASH_BLOCK = 1 << 14


def total_buckets(buckets: int) -> int:
    """Return one more than the highest bucket number: the product of the factors."""
    return math.prod(factorise(buckets))


def factorise(buckets: int) -> list[int]:
    """Return even factors of at most 128 whose product is at least `buckets`. Rotations then cost
    the sum of the factors instead of their product.
    """
    if buckets <= _MOST_DIRECTIONS:
        return [buckets]
    first = 1 << (buckets.bit_length() // 2)
    second = -(-buckets // first)
    return [first, *factorise(second + second % 2)]


def hash_buckets(x: Tensor, buckets: int, rounds: int, seed: int, first_head: int = 0) -> Tensor:
    """Return the bucket of every vector in every round, [heads, rounds, ...] int64, below
    `total_buckets`. No gradient.

    x: [heads, ..., d]; first_head: number of the first head. Rotations depend on (seed, head,
    round) alone, so they are the same on every rank, in recomputation and in decoding.
    """
    if buckets == 1:
        return torch.zeros(x.shape[0], rounds, *x.shape[1:-1], dtype=torch.int64, device=x.device)
    drawn = rotations.__wrapped__ if is_traced(x) else rotations
    directions = [
        drawn(
            fold(seed, _ROTATIONS, number),
            first_head,
            len(x),
            rounds * (factor // 2),
            x.shape[-1],
            x.device,
        )
        for number, factor in enumerate(factorise(buckets))
    ]
    # One head at a time stays in a CPU's cache; on a GPU each would be a dozen launches.
    step = len(x) if x.is_cuda else 1
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        parts = [
            _hash_heads(part.flatten(1, -2), rounds, *some)
            for part, *some in zip(*(y.split(step) for y in (x, *directions)), strict=True)
        ]
        hashed = torch.cat(parts) if len(parts) > 1 else parts[0]
        return hashed.unflatten(-1, x.shape[1:-1])


def _hash_heads(x: Tensor, rounds: int, *rotated: Tensor) -> Tensor:
    """Return buckets, [heads, rounds, tokens]. x: [heads, tokens, d]; rotated: for each factor,
    [heads, rounds x half of it, d].
    """
    heads, tokens, _ = x.shape
    hashed = torch.zeros(heads, rounds, tokens, dtype=torch.int64, device=x.device)
    scale = 1
    for directions in rotated:
        half = directions.shape[1] // rounds
        for first in range(0, tokens, _HASH_BLOCK):
            block = slice(first, first + _HASH_BLOCK)
            part = (x[:, block].float() @ directions.mT).unflatten(-1, (rounds, half))
            # Each direction gives two buckets, itself and its opposite: half the products of an
            # argmax over [x R, -x R].
            highest, lowest = part.max(-1), part.min(-1)
            index = torch.where(
                highest.values >= -lowest.values, highest.indices, lowest.indices + half
            )
            hashed[:, :, block].add_(index.mT, alpha=scale)
        scale *= 2 * half
    return hashed


@lru_cache(maxsize=256)  # a layer's are some 100 KB
def rotations(
    key: int, first_head: int, heads: int, count: int, dim: int, device: torch.device
) -> Tensor:
    """Return the directions of some heads, [heads, count, dim]. Drawing them takes 60 launches,
    several times those of hashing.
    """
    # Each head takes `count` rows of the endless matrix, so heads never share directions.
    rows = normal_rows(key, first_head * count, heads * count, dim, device)
    return rows.unflatten(0, (heads, count))
