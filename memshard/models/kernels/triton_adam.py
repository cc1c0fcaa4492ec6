"""The Adam step on rows in Triton, launched by triton_rows.py.

A program sums one row's gradient and updates its values and moments in the same pass.
"""

import triton
import triton.language as tl

from memshard.models.kernels.triton_random import random_bits
from memshard.models.kernels.triton_reads import add_segment


@triton.jit(do_not_specialize=["slots", "tokens", "first_row", "first_column", "key"])
def adam_rows(
    values,
    exp_avg,
    exp_avg_sq,
    master,
    rows,
    starts,
    bags,
    weights,
    upstream,
    windows,
    step_sizes,
    decay1,
    decay2,
    slots,
    tokens,
    dim,
    first_row,
    first_column,
    key,
    beta2,
    rest1,
    rest2,
    eps,
    step_size,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Update row rows[i] by the gradient of segment i. Arguments: `AdamUpdate`, and rest1, rest2 =
    1 - beta1, 1 - beta2.
    """
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = tl.load(rows + segment)
    # Repeated rows fill up the number of distinct ones, which only the device knows.
    if tl.load(rows + segment - 1, mask=segment > 0, other=-1) == row:
        return
    # A read outside the table has given NaN already; here it must not write.
    mask = (columns < dim) & (row >= 0) & (row < slots)
    place = row * dim + columns
    # Loaded before the sum, so that both loads are under way together.
    m = tl.load(exp_avg + place, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq + place, mask=mask, other=0.0)
    value = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
    if master is not None:
        # Values that somebody has written since do not round from their copies.
        copy = tl.load(master + place, mask=mask, other=0.0)
        value = tl.where(copy.to(values.dtype.element_ty).to(tl.float32) == value, copy, value)
    first, last = tl.load(starts + segment), tl.load(starts + segment + 1)
    gradient = add_segment(
        upstream, bags, weights, windows, first, last, tokens, dim, columns, WINDOW, TILE, WIDTH
    )

    if decay1 is not None:
        m *= tl.load(decay1 + segment)
        v *= tl.load(decay2 + segment)
    m += rest1 * (gradient - m)
    v = v * beta2 + rest2 * gradient * gradient
    size = step_size
    if step_sizes is not None:
        size = tl.load(step_sizes + segment)
    # Rounded to nearest, as in torch: Triton's own division and root are approximations.
    value -= tl.div_rn(m, tl.sqrt_rn(v) + eps) * size

    tl.store(exp_avg + place, m, mask=mask)
    tl.store(exp_avg_sq + place, v, mask=mask)
    if master is not None:
        tl.store(master + place, value, mask=mask)
    elif values.dtype.element_ty == tl.float16:
        value = _round(
            value, random_bits(key, row + first_row, columns + first_column), 10, -14, 65504.0
        )
    elif values.dtype.element_ty == tl.bfloat16:
        value = _round(
            value,
            random_bits(key, row + first_row, columns + first_column),
            7,
            -112,
            3.3895313892515355e38,
        )
    tl.store(values + place, value.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _round(x, bits, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """Do what `plain_rows.round_stochastically` does, before the cast."""
    exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, (127 + SMALLEST) << 23)
    quantum = exponent - (MANTISSA << 23)
    uniform = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / (1 << 23))
    size = tl.abs(x)
    scaled = size * ((254 << 23) - quantum).to(tl.float32, bitcast=True)
    whole = tl.floor(scaled)
    step = quantum.to(tl.float32, bitcast=True)
    rounded = (whole + (uniform < scaled - whole).to(tl.float32)) * step
    rounded = tl.where((rounded > LARGEST) & (size < LARGEST + step / 2), LARGEST, rounded)
    # The sign of x, of -0 as well.
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
