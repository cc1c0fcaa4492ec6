"""Keyed permutations of sample numbers: any element alone, without a table."""

import math

import numpy as np

# Sequences of this many tokens are shuffled together, consecutive ones in the order of documents.
# A document of 64 k tokens is then spread over 2^26 tokens; and what a rank of a run on remote
# shards touches at a time are as many, 128 MiB.
WINDOW_TOKENS = 1 << 26
ROUNDS = 8
# The constants of splitmix64 (Steele et al. 2014), a hash of 64 bits.
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2 = np.uint64(30), np.uint64(27)


def permuted(numbers: np.ndarray, size: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """Return where a permutation of range(size) sends these numbers, int64 of their shape.

    A pure function of (size, seed, epoch, window): a Feistel network over pairs of digits (Black
    and Rogaway 2002), whose two bases have a product of at least `size` and less than size +
    sqrt(size) + 1; what lands outside walks on along its cycle.
    """
    keys = np.random.Philox(
        # Keys from 2^42 on, apart from those of documents.py, mixture.py and records.py; the
        # counter has a word of its own for the window.
        key=np.array([seed, (1 << 42) + epoch], dtype=np.uint64),
        counter=np.array([0, window, 0, 0], dtype=np.uint64),
    ).random_raw(ROUNDS)
    base = math.isqrt(size - 1) + 1
    return _walk(
        numbers.astype(np.uint64),
        np.uint64(size),
        np.uint64(-(-size // base)),
        np.uint64(base),
        keys,
    ).astype(np.int64)


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
    """Return 64 mixed bits of each digit; products wrap around at 2^64."""
    mixed = digits ^ key
    mixed = (mixed ^ (mixed >> _SHIFT_1)) * _MULTIPLIER_1
    mixed = (mixed ^ (mixed >> _SHIFT_2)) * _MULTIPLIER_2
    hashed: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return hashed
