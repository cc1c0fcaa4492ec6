"""Rows of n-grams: vectors by hand for each rule, and torch, numpy and plain integers agree."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from memshard.models.ngram.addresses import Addresses
from memshard.models.ngram.build import build_addresses
from memshard.models.ngram.kinds import RULES, NgramConfig
from memshard.models.ngram.naive import (
    naive_bigram,
    naive_engram,
    naive_longcat,
    naive_token,
)
from memshard.models.ngram.pcg64 import draw_below
from memshard.models.ngram.rules import splitmix64

MOST = (1 << 63) - 1


def addresses(rule: str, token_ids: int, layer: int = 3, **settings: object) -> Addresses:
    config = NgramConfig(rule=rule, layers=(1, 3), eos=token_ids - 1, **settings)
    return build_addresses(config, token_ids, layer)


def test_a_token_reads_its_own_row() -> None:
    assert addresses("token", 9)(torch.tensor([[0], [8]])).tolist() == [[0], [8]]


def test_a_bigram_by_hand() -> None:
    """36313 * 3 = 108,939 = 0b11010100110001011; 27191 * 2 = 54,382 = 0b01101010001101110; their
    XOR is 0b10111110111100101 = 97,765 = 97 * 1007 + 86. A token with none before it has row 97.
    """
    rows = addresses("bigram", 50, rows=98)(torch.tensor([[3, 2], [3, -1]]))
    assert (36313 * 3) ^ (27191 * 2) == 97_765 == 97 * 1007 + 86
    assert rows.tolist() == [[86], [97]]


def test_a_longcat_number_by_hand() -> None:
    """Base 10: 7 after 4 is 47, 7 after 4 after 2 is 247; sizes are 21, 23, 25 and 27."""
    rows = addresses("longcat", 10, rows=20, heads=2)(torch.tensor([[7, 4, 2], [7, -1, -1]]))
    bigrams = [47 % 21, 21 + 47 % 23]
    trigrams = [44 + 247 % 25, 69 + 247 % 27]
    assert rows.tolist() == [[5, 22, 66, 73], [7, 28, 51, 76]]
    assert rows[0].tolist() == [*bigrams, *trigrams]


def test_engram_and_qwen_by_hand() -> None:
    """With multipliers 3, 5, 7 and sizes 11, 13: 4 * 3 ^ 2 * 5 = 12 ^ 10 = 6, and 6 ^ 1 * 7 = 1."""
    for rule in ("engram", "qwen"):
        layer = addresses(rule, 50, rows=11, heads=1, layer=1)
        layer.multipliers.copy_(torch.tensor([[[3, 5, 0]], [[3, 5, 7]]]))
        assert layer.moduli.tolist() == [[11], [13]]
        assert layer(torch.tensor([4, 2, 1])).tolist() == [6, 11 + 1]


def test_what_is_missing_counts_as_the_padding() -> None:
    window = torch.tensor([[4, 2, -1], [4, -1, -1]])
    for rule, pad in (("engram", 0), ("qwen", 49), ("longcat", 0)):
        layer = addresses(rule, 50)
        assert torch.equal(layer(window), layer(window.where(window >= 0, pad)))
    assert addresses("engram", 50, pad=7).padding == 7


def test_engram_multipliers_are_numpys() -> None:
    """The reference draws with numpy's default_rng, seeded by seed + 10007 * layer."""
    for seed, token_ids in ((0, 99_000), (5, 50), (1 << 40, 1 << 29)):
        layer = addresses("engram", token_ids, seed=seed, order=4)
        bound = MOST // token_ids // 2
        drawn = np.random.default_rng(seed + 10007 * 3).integers(0, bound, 4, dtype=np.int64)
        assert layer.multipliers[-1, 0].tolist() == (drawn * 2 + 1).tolist()
        assert layer.multipliers[0, 0].tolist() == [*(drawn * 2 + 1).tolist()[:2], 0, 0]


@pytest.mark.parametrize("bound", [(1 << 32) + 1, (1 << 62) + 1, 1 << 63, MOST // 248_320 // 2])
def test_drawing_below_a_bound_is_numpys(bound: int) -> None:
    """A quarter of what PCG64 gives is refused for 2**62 + 1, none for 2**63."""
    for seed in (0, 1, 10_007, (1 << 31) + 1, (1 << 64) - 1, (1 << 128) - 1):
        expected = np.random.default_rng(seed).integers(0, bound, 20, dtype=np.int64)
        assert draw_below(bound, 20, seed) == expected.tolist()


def test_qwen_multipliers_are_splitmix64s() -> None:
    """Its first number from seed 1,234,567, by Vigna's public test vector, and the published
    model's multipliers by the formula.
    """
    assert splitmix64(1_234_567) == 6_457_827_717_110_365_317
    layer = build_addresses(
        NgramConfig(rule="qwen", layers=(1,), seed=1234, eos=248_044), 248_320, 1
    )
    bound = MOST // 248_320 // 2
    golden = 0x9E3779B97F4A7C15
    expected = [2 * (splitmix64((1234 + golden * k) % (1 << 64)) % bound) + 1 for k in (1, 2, 3)]
    assert layer.multipliers[-1, 0].tolist() == expected


def test_layers_have_multipliers_and_primes_of_their_own_unless_shared() -> None:
    window = torch.tensor([[5, 6, 7]])
    for rule in ("engram", "qwen"):
        first, second = (addresses(rule, 50, layer=layer) for layer in (1, 3))
        assert not set(first.moduli.flatten().tolist()) & set(second.moduli.flatten().tolist())
        assert not torch.equal(first.multipliers, second.multipliers)
        first, second = (addresses(rule, 50, layer=layer, share=True) for layer in (1, 3))
        assert torch.equal(first(window), second(window))


def _windows(token_ids: int, order: int) -> list[list[int]]:
    draw = random.Random(order)
    ids = [0, 1, token_ids - 1, token_ids // 2]
    return [
        [draw.choice([*ids, draw.randrange(token_ids), -1]) if k else draw.choice(ids) for k in w]
        for w in [range(order)] * 200
    ]


def _naive(rule: str, layer: Addresses, window: list[int], token_ids: int) -> list[int]:
    heads = layer.reads // max(layer.order - 1, 1)
    if rule == "token":
        return naive_token(window)
    if rule == "bigram":
        return naive_bigram(window, layer.slots)
    if rule == "longcat":
        return naive_longcat(window, token_ids, heads, 1000, layer.padding)
    multipliers, primes = layer.multipliers[-1, 0].tolist(), layer.moduli.flatten().tolist()
    return naive_engram(window, multipliers, primes, heads, layer.padding)


@pytest.mark.parametrize("token_ids", [2, 50, 248_320, 1 << 29])
@pytest.mark.parametrize("rule", RULES)
def test_torch_numpy_and_plain_integers_agree(rule: str, token_ids: int) -> None:
    """Also with the largest ids, whose products come to the edge of 63 bits."""
    orders = {"token": (1,), "bigram": (2,)}.get(rule, (2, 3, 5))
    for order in orders:
        layer = addresses(rule, token_ids, rows=1000, order=order)
        windows = _windows(token_ids, order)
        rows = layer(torch.tensor(windows))
        assert rows.dtype == torch.int64 and rows.shape == (200, layer.reads)
        assert rows.tolist() == [_naive(rule, layer, window, token_ids) for window in windows]
        assert layer.numpy_rows(np.array(windows)).tolist() == rows.tolist()
        assert rows.min() >= 0 and rows.max() < layer.slots


def test_products_beyond_64_bits_wrap_around() -> None:
    """Ids that are larger than was said, as after a change of vocabulary: still rows, the same."""
    layer = addresses("engram", 50)
    windows = [[MOST, MOST // 3, 1 << 62], [1 << 60, MOST - 1, 0]]
    rows = layer(torch.tensor(windows))
    assert rows.tolist() == [_naive("engram", layer, window, 50) for window in windows]
    assert layer.numpy_rows(np.array(windows)).tolist() == rows.tolist()
    assert rows.min() >= 0 and rows.max() < layer.slots


def test_reads_have_parts_of_the_table_of_their_own() -> None:
    layer = addresses("engram", 50, rows=10, heads=2)
    rows: Tensor = layer(torch.randint(50, (500, 3)))
    for read in range(4):
        start = int(layer.offsets.flatten()[read])
        assert sorted(set(rows[:, read].tolist())) == list(
            range(start, start + int(layer.moduli.flatten()[read]))
        )


def test_any_shape_of_windows_is_taken() -> None:
    layer = addresses("engram", 50)
    window = torch.randint(50, (4, 6, 3))
    assert torch.equal(layer(window)[2, 3], layer(window[2, 3]))
    assert layer(window[:0]).shape == (0, 6, 16)


def test_a_model_made_on_the_meta_device_gets_its_numbers() -> None:
    with torch.device("meta"):
        layer = addresses("engram", 50)
    layer.to_empty(device="cpu").reset_parameters()
    expected = addresses("engram", 50).state_dict()
    assert {name: v.tolist() for name, v in layer.state_dict().items()} == {
        name: v.tolist() for name, v in expected.items()
    }


def test_numbers_too_large_for_64_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="model.ngram.token_ids is 0; it must be from 1"):
        build_addresses(NgramConfig(), 0, 0)
    with pytest.raises(ValueError, match="set it to at most 5,726,623,029"):
        addresses("longcat", 1 << 29, rows=1 << 33, heads=8)
    addresses("longcat", 1 << 29, rows=5_726_623_029, heads=8)
