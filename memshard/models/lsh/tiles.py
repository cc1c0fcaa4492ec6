"""Tiles of sorted tokens: a chunk's queries with the keys of it and of the chunk before, and which
pairs of them do not count. Letters as in `banded`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from memshard.models.lsh.bucket_order import Order

_TILE_BYTES = 1 << 20  # scores of a block of tiles: about a core's second-level cache
_DEVICE_TILE_BYTES = 1 << 28


@dataclass(frozen=True)
class Tiles:
    """Consecutive chunks. places: theirs; with_previous: theirs and those of the chunk before."""

    order: Order
    chunk: int
    places: slice
    with_previous: slice

    def queries(self, x: Tensor) -> Tensor:
        """Gather [N, L, d] into [tiles, C, d]."""
        return (
            x.flatten(0, 1)
            .index_select(0, self.order.tokens[self.places])
            .view(-1, self.chunk, x.shape[-1])
        )

    def keys(self, x: Tensor) -> Tensor:
        """Gather [N, L, d] into [tiles, 2C, d], each chunk after the one before: a view."""
        rows, dim = (
            x.flatten(0, 1).index_select(0, self.order.tokens[self.with_previous]),
            x.shape[-1],
        )
        # Neighbouring tiles share a chunk: a view of overlapping tiles instead of a
        # copy twice as large.
        return rows.as_strided(
            (len(rows) // self.chunk - 1, 2 * self.chunk, dim), (self.chunk * dim, dim, 1)
        )


def tiles_of(
    orders: list[Order], number: int, window: int, chunk: int, itself: bool, outside: Tensor
) -> Iterator[tuple[Tiles, Tensor]]:
    """Yield blocks of tiles, and the pairs that do not count, [tiles, C, 2C] bool: those that do
    not meet in this round, or already met in an earlier one.
    """
    order = orders[number]
    device = order.tokens.device
    nearest = 0 if itself else 1
    earlier = [other.codes[order.places] for other in orders[:number]]
    size = chunk * max(
        1, (_TILE_BYTES if device.type == "cpu" else _DEVICE_TILE_BYTES) // (8 * chunk * chunk)
    )
    # The first chunk comes before all rows and contains no token.
    for first in range(chunk, len(order.groups), size):
        last = min(first + size, len(order.groups))
        tiles = Tiles(order, chunk, slice(first, last), slice(first - chunk, last))
        query, key = _pairs(order.groups, tiles)
        unseen = (query != key).logical_or_(outside)
        for codes in earlier:
            query, key = _pairs(codes, tiles)
            apart = query - key
            unseen |= (apart >= nearest) & (apart < nearest + window)
        yield tiles, unseen


def _pairs(numbers: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Return the numbers at the places of queries, [tiles, C, 1], and of keys, [tiles, 1, 2C]."""
    return numbers[tiles.places].view(-1, tiles.chunk, 1), numbers[tiles.with_previous].unfold(
        0, 2 * tiles.chunk, tiles.chunk
    )[:, None]


@lru_cache(maxsize=16)
def outside_window(window: int, chunk: int, itself: bool, device: torch.device) -> Tensor:
    """Return which of two chunks' places are no predecessors of the second's, [C, 2C] bool."""
    keys = torch.arange(2 * chunk, device=device)
    distance, nearest = keys[chunk:, None] - keys, 0 if itself else 1
    return (distance < nearest) | (distance >= nearest + window)
