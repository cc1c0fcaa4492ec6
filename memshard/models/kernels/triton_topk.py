"""The k largest of each row of int64 in Triton, in registers (bitonic top-k, Shanbhag et al. 2018).

They do what `tl.topk` and `tl.bitonic_merge` do, whose partner of a number is found by a reduction
that Triton's interpreter makes number by number, a thousand times as slowly.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def log2(power: int) -> int:
    """Return the exponent of a power of two."""
    return power.bit_length() - 1


@triton.jit
def side(DIMS: tl.constexpr, AXIS: tl.constexpr):
    """Return 0 and 1 along an axis of a [2, 2, ...], counted from the last."""
    return tl.reshape(tl.arange(0, 2), [1] * (DIMS - AXIS - 1) + [2] + [1] * AXIS)


@triton.jit
def merged(x, falling, STAGES: tl.constexpr):
    """Return a [2, 2, ...] sorted along its last STAGES axes, along which it rises once and falls
    once. falling: 1 where it is to fall, else 0.
    """
    DIMS: tl.constexpr = log2(x.numel)
    for stage in tl.static_range(STAGES):
        # The other of each two: a compiler cancels x and leaves the exchange between threads.
        other = tl.sum(x, DIMS - STAGES + stage, keep_dims=True) - x
        x = tl.where((x > other) != (falling ^ side(DIMS, STAGES - 1 - stage)), other, x)
    return x


@triton.jit
def largest(x, K: tl.constexpr):
    """Return the K largest of each row of x [M, N] int64, descending, [M, K].

    N, K: powers of two from 2 on.
    """
    ROWS: tl.constexpr = x.shape[0]
    LOG_K: tl.constexpr = log2(K)
    LOG_N: tl.constexpr = log2(x.shape[1])
    cube = tl.reshape(x, [2] * log2(x.numel))
    # Groups of K are sorted, every other one falling; the larger of two such groups' numbers, place
    # by place, are the K largest of both.
    for stages in tl.static_range(1, LOG_K + 1):
        if stages < LOG_N:
            cube = merged(cube, side(log2(cube.numel), stages), stages)
        else:
            cube = merged(cube, 1, stages)
    for left in tl.static_range(LOG_K + 1, LOG_N + 1):
        cube = tl.max(cube, log2(cube.numel) - 1 - LOG_K)
        if left < LOG_N:
            cube = merged(cube, side(log2(cube.numel), LOG_K), LOG_K)
        else:
            cube = merged(cube, 1, LOG_K)
    return tl.reshape(cube, [ROWS, K])


@triton.jit
def larger(rising, falling):
    """Return the largest of two [M, K] of rows sorted up and down, as many and ascending."""
    M: tl.constexpr = rising.shape[0]
    K: tl.constexpr = rising.shape[1]
    # The larger of each two are the largest of both, and rise once and fall once.
    both = tl.reshape(tl.maximum(rising, falling), [2] * log2(rising.numel))
    return tl.reshape(merged(both, 0, log2(K)), [M, K])
