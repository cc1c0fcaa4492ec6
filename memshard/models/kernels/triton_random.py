"""The counter-based bits of models/random.py in Triton."""

import triton
import triton.language as tl


@triton.jit
def random_bits(key, number, counter):
    """Return 32 bits, uint32, as `random_bits(fold_tensor(key, number), counter)` does."""
    # Unsigned: shifts of negative numbers would copy the sign.
    x = (number ^ key).to(tl.uint64) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return _mix(
        _mix(counter.to(tl.uint32) ^ (x & 0xFFFFFFFF).to(tl.uint32)) ^ (x >> 32).to(tl.uint32)
    )


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
