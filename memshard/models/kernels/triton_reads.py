"""Weighted sums of rows and their gradients to the weights, in Triton, launched by triton_rows.py.

plain_rows.py is the reference of everything here. A program works on WIDTH columns, TILE reads at a
time, so that their loads are under way together. Row numbers become int64 before they are
multiplied, since a table may have more than 2^31 values; values become fp32 right after each load.
Numbers that change from call to call are not specialised: Triton would compile the kernel anew for
each of their kinds (1, multiples of 16).
"""

import triton
import triton.language as tl


@triton.jit
def add_rows(
    values, rows, weights, first, last, slots, dim, columns, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """Return the sum of weights[j] * values[rows[j], columns] over first <= j < last, [WIDTH] fp32.

    A row outside the table makes it NaN.
    """
    # One sum for each place in a tile, joined at the end: the order of additions is fixed.
    sums = tl.zeros((TILE, WIDTH), tl.float32)
    for start in range(first, last, TILE):
        reads = start + tl.arange(0, TILE)
        asked = reads < last
        row = tl.load(rows + reads, mask=asked, other=0).to(tl.int64)
        inside = (row >= 0) & (row < slots)
        # NaN and not an error: a GPU kernel cannot raise, and the guard on gradients sees NaN.
        weight = tl.where(inside, tl.load(weights + reads, mask=asked, other=0.0), float("nan"))
        mask = (asked & inside)[:, None] & (columns < dim)[None, :]
        sums += weight[:, None] * tl.load(
            values + row[:, None] * dim + columns[None, :], mask=mask, other=0.0
        ).to(tl.float32)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["known", "reads", "slots"])
def gather_sum(
    values,
    rows,
    weights,
    firsts,
    lasts,
    known,
    reads,
    out,
    slots,
    dim,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store in out[bag] the sum of the reads from firsts[bag] to lasts[bag].

    From the bag `known` on, `lasts` ends and the reads go to `reads`, their number.
    """
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first, last = tl.load(firsts + bag), tl.load(lasts + bag, mask=bag < known, other=reads)
    sums = add_rows(values, rows, weights, first, last, slots, dim, columns, TILE, WIDTH)
    tl.store(out + bag * dim + columns, sums, mask=columns < dim)


@triton.jit(do_not_specialize=["known", "reads", "slots"])
def score_gradients(
    values,
    rows,
    firsts,
    lasts,
    known,
    reads,
    upstream,
    out,
    slots,
    dim,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store in out[j] the product values[rows[j]] . upstream[bag of j]."""
    bag = tl.program_id(0).to(tl.int64)
    first, last = tl.load(firsts + bag), tl.load(lasts + bag, mask=bag < known, other=reads)
    for start in range(first, last, TILE):
        read = start + tl.arange(0, TILE)
        asked = read < last
        row = tl.load(rows + read, mask=asked, other=0).to(tl.int64)
        inside = (row >= 0) & (row < slots)
        products = tl.zeros((TILE,), tl.float32)
        # One program for all columns, unlike in `gather_sum`: programs that share a product would
        # have to add by atomics, in no fixed order.
        for column in range(0, dim, WIDTH):
            columns = column + tl.arange(0, WIDTH)
            mask = (asked & inside)[:, None] & (columns < dim)[None, :]
            x = tl.load(values + row[:, None] * dim + columns[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
            y = tl.load(upstream + bag * dim + columns, mask=columns < dim, other=0.0).to(
                tl.float32
            )
            products += tl.sum(x * y[None, :], 1)
        tl.store(out + read, tl.where(inside, products, float("nan")), mask=asked)


@triton.jit(do_not_specialize=["borders", "slots"])
def window_sums(
    values,
    rows,
    weights,
    starts,
    borders,
    out,
    slots,
    dim,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store in out[window] the sum of its reads, if all of them are inside one segment.

    starts: [borders], of segments; the last is the end of the last segment.
    """
    window = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first = window * WINDOW
    # The first border behind the window's first read.
    low, high = borders * 0, borders
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) <= first:
            low = middle + 1
        else:
            high = middle
    inside = (low > 0) & (low < borders)
    if tl.load(starts + low, mask=inside, other=0) >= first + WINDOW:
        sums = add_rows(
            values, rows, weights, first, first + WINDOW, slots, dim, columns, TILE, WIDTH
        )
        tl.store(out + window * dim + columns, sums, mask=columns < dim)


@triton.jit
def add_segment(
    values,
    rows,
    weights,
    windows,
    first,
    last,
    slots,
    dim,
    columns,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Do what `add_rows` does, with the sums of whole windows taken from `windows`,
    [reads // WINDOW, dim].
    """
    # Reads up to the first whole window, whole windows from `windows`, and the
    # reads after the last.
    head = tl.minimum((first + WINDOW - 1) // WINDOW * WINDOW, last)
    tail = tl.maximum(last // WINDOW * WINDOW, head)
    sums = add_rows(values, rows, weights, first, head, slots, dim, columns, TILE, WIDTH)
    # With windows of 256, a row read 10,000 times takes at most 39 of these sums and
    # 510 single reads.
    for window in range(head // WINDOW, tail // WINDOW):
        sums += tl.load(windows + window * dim + columns, mask=columns < dim, other=0.0)
    return sums + add_rows(values, rows, weights, tail, last, slots, dim, columns, TILE, WIDTH)


@triton.jit(do_not_specialize=["slots"])
def segment_sums(
    values,
    rows,
    weights,
    windows,
    starts,
    out,
    slots,
    dim,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store in out[i] the sum of the reads from starts[i] to starts[i + 1]."""
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first, last = tl.load(starts + segment), tl.load(starts + segment + 1)
    sums = add_segment(
        values, rows, weights, windows, first, last, slots, dim, columns, WINDOW, TILE, WIDTH
    )
    tl.store(out + segment * dim + columns, sums, mask=columns < dim)
