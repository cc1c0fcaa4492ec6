"""The rates by which counted operations and bytes become seconds on an H200. All are assumed until
`memshard bench gpu` has measured them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """A second: products in bf16 or fp16 at width 1,024; attention; scores, by their precision;
    scores that a fused search keeps the best of; memory, bytes read and written; cache, bytes that
    lie in the second level, which holds `cached` bytes; sorted, keys of 32 bits with their places.
    launch: the seconds that one costs the device beside its work.
    """

    products: float = 600e12
    attention: float = 450e12
    fp32: float = 50e12
    tf32: float = 300e12
    bf16x3: float = 200e12
    selected: float = 1.1e11
    memory: float = 4.0e12
    cache: float = 6.0e12
    cached: float = 50e6
    sorted: float = 8e9
    launch: float = 3e-6


H200 = Rates()
"""788 TFLOP/s at width 8,192 and 4.3 TB/s for a copy were measured on such a card; 989 and 4.8 are
its data sheet's. The others are shares of these two, from kernels of the kind.
"""


def rates_of(device: str) -> Rates:
    """Return the rates of a device by its name in `CARDS`. ValueError for one without."""
    if device != "h200-141g":
        raise ValueError(f"--explain knows rates of h200-141g only, not of {device}")
    return H200
