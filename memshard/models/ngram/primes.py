"""Sizes of hash tables that share no factor: primes. Loads no torch."""

from collections.abc import Iterator
from functools import cache

# These bases decide exactly below 3.3e24 (Sorenson and Webster 2015), so for all 64-bit integers.
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(number: int) -> bool:
    """Return whether a number below 3.3e24 is prime (Miller and Rabin's test)."""
    if number < 2:
        return False
    for base in _BASES:
        if number % base == 0:
            return number == base
    twos = ((number - 1) & (1 - number)).bit_length() - 1
    odd = (number - 1) >> twos
    for base in _BASES:
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def primes_from(start: int) -> Iterator[int]:
    """Yield the primes of at least `start`, ascending, without end."""
    number = max(start, 2)
    while True:
        if is_prime(number):
            yield number
        number += 1


@cache
def first_primes(start: int, count: int) -> tuple[int, ...]:
    """Return the first `count` primes of at least `start`."""
    primes = primes_from(start)
    return tuple(next(primes) for _ in range(count))
