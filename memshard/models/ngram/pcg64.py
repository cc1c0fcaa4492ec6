"""numpy's default random numbers, in plain Python integers: the Engram multipliers are drawn from
them, and must not change with numpy's version (which promises nothing about them).
"""

from collections.abc import Iterator

_M32, _M64, _M128 = (1 << 32) - 1, (1 << 64) - 1, (1 << 128) - 1
_STEP = 0x2360ED051FC65DA44385DF649FCCF645


def draw_below(bound: int, count: int, seed: int) -> list[int]:
    """Return what `numpy.random.default_rng(seed).integers(0, bound, count)` draws, for bounds of
    more than 2**32 and of at most 2**63, and seeds below 2**128.
    """
    numbers = _numbers(seed)
    drawn: list[int] = []
    while len(drawn) < count:
        # Lemire's way to a number below the bound: the upper half of a product, whose lower half
        # tells the few draws that some results would have too many of.
        product = next(numbers) * bound
        if product & _M64 >= (1 << 64) % bound:
            drawn.append(product >> 64)
    return drawn


def _numbers(seed: int) -> Iterator[int]:
    """Yield 64-bit numbers of PCG64 (O'Neill 2014, XSL-RR 128/64)."""
    state_high, state_low, step_high, step_low = _seed_words(seed)
    odd = ((step_high << 64 | step_low) << 1 | 1) & _M128
    state = (((state_high << 64 | state_low) + odd) * _STEP + odd) & _M128
    while True:
        state = (state * _STEP + odd) & _M128
        mixed, turn = (state >> 64 ^ state) & _M64, state >> 122
        yield (mixed >> turn | mixed << (64 - turn)) & _M64


def _seed_words(seed: int) -> list[int]:
    """Return four 64-bit numbers from the seed, as numpy's SeedSequence does."""
    pool = _Hash(0x43B0D7E5, 0x931E8875)
    words = [pool.of(seed >> 32 * i & _M32) for i in range(4)]
    for source in range(4):
        for target in range(4):
            if source != target:
                mixed = 0xCA01F9DD * words[target] - 0x4973F715 * pool.of(words[source])
                words[target] = (mixed & _M32) ^ (mixed & _M32) >> 16
    output = _Hash(0x8B51F9DD, 0x58F38DED)
    halves = [output.of(words[i % 4]) for i in range(8)]
    return [low | high << 32 for low, high in zip(halves[::2], halves[1::2], strict=True)]


class _Hash:
    """Hashes 32-bit numbers, each with the next constant of a sequence."""

    def __init__(self, constant: int, factor: int) -> None:
        self.constant, self.factor = constant, factor

    def of(self, value: int) -> int:
        value ^= self.constant
        self.constant = self.constant * self.factor & _M32
        value = value * self.constant & _M32
        return value ^ value >> 16
