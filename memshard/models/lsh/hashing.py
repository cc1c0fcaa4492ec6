"""Locality-sensitive hashing by random rotations (Andoni et al. 2015): vectors at a small angle
often share a bucket.
"""

import math

import torch
from torch import Tensor

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
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return torch.stack(
            [
                _hash_head(part.flatten(0, -2), head, buckets, rounds, seed)
                for head, part in enumerate(x, first_head)
            ]
        ).unflatten(-1, x.shape[1:-1])


def _hash_head(x: Tensor, head: int, buckets: int, rounds: int, seed: int) -> Tensor:
    hashed = torch.zeros(rounds, len(x), dtype=torch.int64, device=x.device)
    scale = 1
    for number, factor in enumerate(factorise(buckets)):
        half = factor // 2
        # Each head takes rounds x half rows of the endless matrix, so heads never share directions.
        key = fold(seed, _ROTATIONS, number)
        directions = normal_rows(key, head * rounds * half, rounds * half, x.shape[-1], x.device)
        for first in range(0, len(x), _HASH_BLOCK):
            part = (x[first : first + _HASH_BLOCK].float() @ directions.mT).unflatten(
                -1, (rounds, half)
            )
            # Each direction gives two buckets, itself and its opposite: half the products of an
            # argmax over [x R, -x R].
            highest, lowest = part.max(-1), part.min(-1)
            index = torch.where(
                highest.values >= -lowest.values, highest.indices, lowest.indices + half
            )
            hashed[:, first : first + _HASH_BLOCK] += scale * index.mT
        scale *= factor
    return hashed
