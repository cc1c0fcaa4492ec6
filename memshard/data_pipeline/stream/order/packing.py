"""Best-fit decreasing over a histogram of sizes: as many steps as there are sizes, not items."""

from collections import defaultdict

import numpy as np


def pack(counts: np.ndarray, capacity: int) -> tuple[list[tuple[int, int, int]], int]:
    """Pack items into bins: the largest first, each into the fullest bin that has room for it.

    counts: int [capacity + 1], items of each size; size 0 is left out. Returns where the items go,
    by falling size, as (items, first bin, items a bin): bins in turn get that many items each, the
    last one what is left. And the number of bins. As a histogram each step fills all bins with the
    same room at once: bins with room r take r // size items of a size, after which none fits.
    """
    places: list[tuple[int, int, int]] = []
    # Bins by room, as ranges; bit r of `open_rooms` tells whether there are any with room r.
    ranges: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    open_rooms = bins = 0
    for size in range(capacity, 0, -1):
        left = int(counts[size])
        while left:
            # The lowest bit from `size` on: the smallest room that is enough.
            enough = open_rooms >> size
            if enough:
                room = size + (enough & -enough).bit_length() - 1
                first, end = ranges[room].pop()
                if not ranges[room]:
                    open_rooms ^= 1 << room
            else:
                room, first = capacity, bins
                bins = end = first + -(-left // (capacity // size))
            each = room // size
            items = min(left, (end - first) * each)
            places.append((items, first, each))
            full, rest = divmod(items, each)
            for begin, stop, taken in (
                (first, first + full, each),
                (first + full, first + full + (rest > 0), rest),
                (first + full + (rest > 0), end, 0),
            ):
                remains = room - taken * size
                if begin < stop and remains:
                    ranges[remains].append((begin, stop))
                    open_rooms |= 1 << remains
            left -= items
    return places, bins
