"""The rules as their sources write them, in plain Python integers: the twins of `Addresses`.

All take a window, the ids of the token itself and of those 1, 2 ... places back, and return its
rows. Integers of 64 bits are written out: XOR and products of non-negative numbers below 2**63 need
no more, larger ones wrap around.
"""

from collections.abc import Iterator, Sequence


def naive_windows(
    tokens: Sequence[int], order: int, begins: Sequence[bool], before: Sequence[int]
) -> list[list[int]]:
    """Return the window of each token of one text; before: the `order` - 1 ids before it, oldest
    first; -1 is no token. begins: where a document begins.
    """
    return [list(_look_back(tokens, order, begins, before, t)) for t in range(len(tokens))]


def _look_back(
    tokens: Sequence[int], order: int, begins: Sequence[bool], before: Sequence[int], t: int
) -> Iterator[int]:
    text, t = [*before, *tokens], t + len(before)
    starts = [False] * len(before) + list(begins)
    seen = True
    for back in range(order):
        # An earlier token is in sight unless the one after it began a document.
        seen = seen and not (back and starts[t - back + 1]) and text[t - back] >= 0
        yield text[t - back] if seen else -1


def naive_token(window: Sequence[int]) -> list[int]:
    """Return the row of a token's id."""
    return [window[0]]


def naive_bigram(window: Sequence[int], rows: int) -> list[int]:
    """Return the row of the last two ids in a table of `rows`."""
    now, last = window
    return [rows - 1 if last < 0 else ((36313 * now) ^ (27191 * last)) % (rows - 1)]


def naive_longcat(
    window: Sequence[int], token_ids: int, heads: int, rows: int, pad: int
) -> list[int]:
    """Return the rows where an n-gram is a number in base `token_ids`."""
    ids = [pad if i < 0 else i for i in window]
    result: list[int] = []
    offset = 0
    for n in range(2, len(ids) + 1):
        for _ in range(heads):
            size = rows // 2 * 2 + 2 * len(result) + 1
            result.append(offset + sum(i * token_ids**k for k, i in enumerate(ids[:n])) % size)
            offset += size
    return result


def naive_engram(
    window: Sequence[int],
    multipliers: Sequence[int],
    primes: Sequence[int],
    heads: int,
    pad: int,
) -> list[int]:
    """Return the rows by products combined with XOR; primes: of each order, then head."""
    ids = [pad if i < 0 else i for i in window]
    result: list[int] = []
    offset = 0
    for read, prime in enumerate(primes):
        mix = 0
        for i, multiplier in zip(ids[: 2 + read // heads], multipliers, strict=False):
            mix ^= _wrapped(i * multiplier)
        result.append(offset + mix % prime)
        offset += prime
    return result


def _wrapped(number: int) -> int:
    """Return what a signed 64-bit integer keeps of a number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
