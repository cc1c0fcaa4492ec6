"""Counter-based randomness: every draw is a pure function of its key, so that layouts,
recomputation and resumed runs agree.

A draw depends neither on earlier draws nor on the rank that makes it. Keys become values by integer
arithmetic and one table look-up, so CPU and GPU agree bit for bit.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from memshard.models.compat import is_fake, outside_modes

_MASK_64 = (1 << 64) - 1
_NORMAL_BITS = 16


@dataclass(frozen=True)
class RandomKey:
    """The part of a key that is the same in a whole forward pass; layer and branch are added later.

    seed, step: of the run; for layers that torch.compile compiles, the step is a tensor, which is
    no new program in every step. samples: [batch] int64, global number of each row's sample.
    """

    seed: int
    step: int | Tensor
    samples: Tensor

    def on(self, device: torch.device) -> "RandomKey":
        """Return the key with its step as a tensor on a device, made without a copy."""
        assert isinstance(self.step, int)
        step = torch.full((), self.step, dtype=torch.int64, device=device)
        return replace(self, step=step, samples=self.samples.to(device))

    def place_key(self, layer: int, branch: int) -> int | Tensor:
        """Return `fold` of seed, step, layer and branch; an int64 tensor if the step is one."""
        if not isinstance(self.step, Tensor):
            return fold(self.seed, self.step, layer, branch)
        key = fold_tensor(fold(self.seed), self.step)
        for number in (layer, branch):
            key = fold_tensor(number, key)
        return key


def fold(*numbers: int) -> int:
    """Mix numbers into one 64-bit key by splitmix64 steps, and return it as a signed integer."""
    key = 0
    for number in numbers:
        # The constants of splitmix64 (Steele et al. 2014). Python's integers do
        # not wrap around: mask.
        key = (key ^ (number & _MASK_64)) + 0x9E3779B97F4A7C15 & _MASK_64
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
        key = (key ^ key >> 27) * 0x94D049BB133111EB & _MASK_64
        key ^= key >> 31
    return key - (1 << 64) if key >> 63 else key


def fold_tensor(key: int | Tensor, numbers: Tensor) -> Tensor:
    """Mix a key with each of many numbers, in the manner of `fold`. numbers: int64 of any shape;
    returns int64 of that shape.
    """
    # torch has no unsigned 64-bit arithmetic: the same constants as negative numbers of
    # the same bits.
    mixed = (numbers ^ key) + (0x9E3779B97F4A7C15 - (1 << 64))
    mixed = (mixed ^ _shift(mixed, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    mixed = (mixed ^ _shift(mixed, 27)) * (0x94D049BB133111EB - (1 << 64))
    return mixed ^ _shift(mixed, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right without copying the sign."""
    return x >> bits & ((1 << 64 - bits) - 1)


def random_bits(keys: Tensor, counters: Tensor) -> Tensor:
    """Return 32 random bits for every (key, counter), as int32. keys: int64; counters: int32."""
    bits = _mix_(counters ^ keys.to(torch.int32))
    bits ^= (keys >> 32).to(torch.int32)
    return _mix_(bits)


def _mix_(x: Tensor) -> Tensor:
    """Apply a bijection of 32-bit integers with low bias (Wellons 2018), in place: twice as fast.
    Relies on int32 arithmetic that wraps around.
    """
    shifted = x >> 16
    x ^= shifted.bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= torch.bitwise_right_shift(x, 15, out=shifted).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - (1 << 32)
    x ^= torch.bitwise_right_shift(x, 16, out=shifted).bitwise_and_(0xFFFF)
    return x


def dropout(
    x: Tensor, rate: float, key: RandomKey, positions: Tensor, layer: int, branch: int
) -> Tensor:
    """Zero elements with probability `rate` and scale the others by 1 / (1 - rate).

    x: [batch, length, dim]; positions: [batch, length] int64, of each token in its sample; layer,
    branch: place in the model. A token of a sample gets the same mask in every parallel layout.
    """
    # Not at the top: what chooses among kernels asks this module for the bits to compare with.
    from memshard.models.kernels.dropout import dropout_for

    folded = key.place_key(layer, branch)
    return dropout_for(x, plain_dropout)(x, rate, folded, key.samples.to(x.device), positions)


def plain_dropout(
    x: Tensor, rate: float, key: int | Tensor, samples: Tensor, positions: Tensor
) -> Tensor:
    """Do what `dropout` does, in plain torch. key: of the run, the step and the place in the model,
    folded; samples: [batch] int64.
    """
    keys = fold_tensor(key, samples)
    channels = torch.arange(x.shape[-1], device=x.device, dtype=torch.int32)
    # Numbers of (position, channel) wrap around after 2^32 of them, far beyond any sequence.
    counters = (positions * x.shape[-1]).to(torch.int32)[..., None] + channels
    # 31 of the bits, because comparisons of int32 are signed.
    keep = random_bits(keys[:, None, None], counters) & 0x7FFFFFFF >= int(rate * (1 << 31))
    return torch.where(keep, x / (1 - rate), 0)


def normal_rows(
    seed: int, first: int, count: int, dim: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return rows first .. first + count - 1 of an endless standard normal
    matrix, [count, dim] fp32.

    A row depends on (seed, row number) alone. Values are quantiles at 2^16 points: the same bits on
    every device, and at most 4.3.
    """
    return normal_at(seed, torch.arange(first, first + count, device=device), dim)


def normal_at(seed: int, rows: Tensor, dim: int) -> Tensor:
    """Return the given rows of the matrix of `normal_rows`, [n, dim] fp32. rows: [n] int64."""
    keys = fold_tensor(fold(seed), rows)
    pairs = torch.arange((dim + 1) // 2, device=rows.device, dtype=torch.int32)
    bits = random_bits(keys[:, None], pairs)
    # 32 bits are two values of 16, each an index into the table.
    halves = torch.stack((bits & 0xFFFF, bits >> 16 & 0xFFFF), dim=-1).flatten(1)[:, :dim]
    table = _normal_quantiles().to(rows.device) if is_fake(rows) else quantiles_on(rows.device)
    return table[halves.long()]


@cache
def quantiles_on(device: torch.device) -> Tensor:
    """Return the table of `normal_at` on a device, copied there once: 256 KB."""
    return _normal_quantiles().to(device)


@cache
def _normal_quantiles() -> Tensor:
    """Return the quantiles of the standard normal at (i + 1/2) / 2^16, rounded from fp64."""
    with outside_modes():
        steps = torch.arange(1 << _NORMAL_BITS, dtype=torch.float64, device="cpu")
        return torch.special.ndtri((steps + 0.5) / (1 << _NORMAL_BITS)).float()
