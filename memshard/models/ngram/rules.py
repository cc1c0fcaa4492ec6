"""The rules by which token ids choose rows: each builds its `Addresses`."""

import operator
from collections.abc import Sequence

from memshard.models.ngram.addresses import Addresses
from memshard.models.ngram.kinds import NgramConfig
from memshard.models.ngram.pcg64 import draw_below

_LAYER_STEP = 10007
_MOST = (1 << 63) - 1
_M64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def token(settings: NgramConfig, token_ids: int, layer: int) -> Addresses:
    """Return addresses where a token reads the row of its id."""
    return Addresses(settings, token_ids, layer, [[[1]]])


def bigram(settings: NgramConfig, token_ids: int, layer: int) -> Addresses:
    """Return addresses by KellerJordan/modded-nanogpt's hash of the last two ids, in 64 bits where
    that has 32 (up to 59,139 ids they agree); a token with none before it has the last row.
    """
    return Addresses(settings, token_ids, layer, [[[36313, 27191]]], spare=True)


def longcat(settings: NgramConfig, token_ids: int, layer: int) -> Addresses:
    """Return addresses of over-encoding (Huang et al. 2025, arXiv 2501.16975) as LongCat-Flash-Lite
    has them: ids are the digits of a number in base `token_ids`, the oldest first.
    """
    sizes = settings.sizes(token_ids, layer)
    if settings.length * token_ids * max(sizes) > _MOST:
        raise ValueError(
            f"model.ngram.rows is {settings.rows}; sums of {settings.length} products with ids "
            f"below {token_ids} must fit into 64 bits: set it to at most "
            f"{_MOST // (settings.length * token_ids) - 2 * len(sizes):,}"
        )
    heads = settings.tables_of_order
    multipliers = [
        [
            [pow(token_ids, back, size) for back in range(length)]
            for size in sizes[(length - 2) * heads : (length - 1) * heads]
        ]
        for length in range(2, settings.length + 1)
    ]
    return Addresses(settings, token_ids, layer, multipliers, operator.add)


def engram(settings: NgramConfig, token_ids: int, layer: int) -> Addresses:
    """Return addresses by deepseek-ai/Engram's hash, with multipliers that depend on the layer."""
    number = settings.layers[settings.table_index(layer)]
    seed = settings.seed + _LAYER_STEP * number
    drawn = draw_below(_multiplier_bound(token_ids), settings.length, seed)
    return _by_products(settings, token_ids, layer, drawn)


def qwen(settings: NgramConfig, token_ids: int, layer: int) -> Addresses:
    """Return addresses by the hash of Qwen's per-layer embeddings (transformers, qwen4_exp), with
    multipliers that depend on which of the tables it is.
    """
    seed = settings.seed + _LAYER_STEP * settings.table_index(layer)
    drawn = [
        splitmix64(seed + _GOLDEN * (back + 1)) % _multiplier_bound(token_ids)
        for back in range(settings.length)
    ]
    return _by_products(settings, token_ids, layer, drawn)


def splitmix64(value: int) -> int:
    """Return the first number that SplitMix64 (Steele, Lea and Flood 2014) draws from a seed."""
    value = value + _GOLDEN & _M64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _M64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _M64
    return value ^ value >> 31


def _by_products(
    settings: NgramConfig, token_ids: int, layer: int, drawn: Sequence[int]
) -> Addresses:
    """Return addresses whose multipliers are the odd numbers 2 m + 1 of the numbers drawn."""
    odd = [2 * number + 1 for number in drawn]
    multipliers = [[odd[:length]] for length in range(2, settings.length + 1)]
    return Addresses(settings, token_ids, layer, multipliers)


def _multiplier_bound(token_ids: int) -> int:
    """Return a bound that keeps products of 2 m + 1 with ids, m below it, within 63 bits."""
    return _MOST // token_ids // 2
