"""Keyed permutations of sample numbers: any element alone, without a table."""

import math
from functools import lru_cache

import numpy as np

# Sequences of this many tokens are shuffled together: a document of 65,536 tokens is spread over a
# thousand times as many. They come from blocks of neighbouring documents of about BLOCK_TOKENS, in
# half of which fetches of 4 MiB from a remote corpus find what they want.
WINDOW_TOKENS = 1 << 26
BLOCK_TOKENS = 1 << 20
ROUNDS = 8
# The multipliers of splitmix64 (Steele et al. 2014), a hash of 64 bits.
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


def permuted(numbers: np.ndarray, size: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """Return where a permutation of range(size) sends these numbers, int64 of their shape.

    A pure function of (size, seed, epoch, window): a Feistel network over pairs of digits (Black
    and Rogaway 2002), whose two bases have a product of at least `size` and less than size +
    sqrt(size) + 1; what lands outside walks on along its cycle.
    """
    keys = _keys(seed, epoch, window)
    base = math.isqrt(size - 1) + 1
    return _walk(
        numbers.astype(np.uint64),
        np.uint64(size),
        np.uint64(-(-size // base)),
        np.uint64(base),
        keys,
    ).astype(np.int64)


@lru_cache(maxsize=8)
def _keys(seed: int, epoch: int, window: int) -> np.ndarray:
    """Return the keys of the rounds, uint64 [ROUNDS]."""
    return np.random.Philox(
        # Keys from 2^42 on, apart from those of documents.py, mixture.py and records.py; the
        # counter has a word of its own for the window.
        key=np.array([seed, (1 << 42) + epoch], dtype=np.uint64),
        counter=np.array([0, window, 0, 0], dtype=np.uint64),
    ).random_raw(ROUNDS)


def _walk(
    numbers: np.ndarray, size: np.uint64, high: np.uint64, low: np.uint64, keys: np.ndarray
) -> np.ndarray:
    """Return the images of numbers below `size`. high, low: bases of the two digits."""
    left, right = np.divmod(numbers, low)
    for turn in range(0, ROUNDS, 2):
        left = (left + _hash(right, keys[turn]) % high) % high
        right = (right + _hash(left, keys[turn + 1]) % low) % low
    images: np.ndarray = left * low + right
    outside = images >= size
    if outside.any():
        images[outside] = _walk(images[outside], size, high, low, keys)
    return images


def _hash(digits: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return 32 mixed bits of each digit; products wrap around at 2^64."""
    mixed = (digits ^ key) * _MULTIPLIER_1
    hashed: np.ndarray = ((mixed ^ (mixed >> _HALF)) * _MULTIPLIER_2) >> _HALF
    return hashed
