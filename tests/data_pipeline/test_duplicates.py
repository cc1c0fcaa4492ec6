"""Which texts count as near duplicates, in scripts with and without spaces, and what that takes."""

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from memshard.data_pipeline.prepare.documents import NEAR_ROW, ROWS_FILE, Filters, Unit
from memshard.data_pipeline.prepare.duplicates import band_keys, clusters, exact_hash, join
from memshard.data_pipeline.prepare.split import split_documents
from tests.data_pipeline.test_build_stages import near_copy, prose

SCRIPTS = {
    "Chinese": (range(0x4E00, 0x5600), "、。"),
    "Japanese": ([*range(0x3041, 0x3090), *range(0x30A1, 0x30F0), *range(0x4E00, 0x5000)], "、。"),
    "Thai": ([*range(0x0E01, 0x0E3B), *range(0x0E40, 0x0E4F)], "  "),
    "Lao": ([*range(0x0E81, 0x0EBE), *range(0x0EC0, 0x0EC5)], "  "),
    "Khmer": (range(0x1780, 0x17D3), " ។"),
    "Burmese": (range(0x1000, 0x103F), " ။"),
    "Tibetan": ([*range(0x0F40, 0x0F6D), *[0x0F0B] * 8], "། "),
    "Yi": (range(0xA000, 0xA400), "、。"),
}


def near(one: str, other: str) -> bool:
    return bool((band_keys(one) == band_keys(other)).any())


def unspaced(script: str, draw: random.Random) -> str:
    """Return 1,500 characters of made-up words without spaces, clauses of some ten words."""
    letters, ends = SCRIPTS[script]
    words = ["".join(map(chr, draw.choices(letters, k=draw.choice([1, 2, 3])))) for _ in range(999)]
    text = "".join(
        word + (draw.choice(ends) if draw.random() < 0.1 else "")
        for word in draw.choices(words, [1 / number for number in range(1, 1000)], k=800)
    )
    return text[:1500]


@pytest.mark.parametrize("script", SCRIPTS)
def test_near_copies_are_found_in_scripts_without_spaces(script: str) -> None:
    """Also with one character in 50 changed."""
    draw = random.Random(0)
    for share, least in ((0.005, 5), (0.01, 5), (0.02, 3)):
        found = 0
        for _ in range(5):
            text = unspaced(script, draw)
            copy = list(text)
            for place in draw.sample(range(len(copy)), int(share * len(copy))):
                copy[place] = chr(draw.choice(SCRIPTS[script][0]))
            found += near(text, "".join(copy))
        assert found >= least
    assert not near(text, unspaced(script, draw))


def test_clauses_are_words_only_where_spaces_part_words() -> None:
    """Foreign names in a text of a language with spaces change nothing; Latin words in a Chinese
    one are words.
    """
    words = prose(100, 0)
    assert (band_keys(" ".join(words)) == band_keys(" , ".join(words))).all()
    mixed = " ".join([*words, "北京市朝阳区"])
    assert band_keys(mixed)[:2].tolist() == [
        7515058455434675187,
        4948148370298859201,
    ]
    chinese = unspaced("Chinese", random.Random(1))
    assert near(chinese + " memory layer", chinese + " memory layer.")


def test_texts_of_symbols_are_duplicates_only_of_equal_ones() -> None:
    symbols = ["😀😃😄 !!! ---", "*** === ~~~ ###", "∑ ∫ √ ≠ ≤ ∞", "—…—…—", "।।।", "!!!"]
    keys = [band_keys(text) for text in symbols]
    assert not any((one == other).any() for place, one in enumerate(keys) for other in keys[:place])
    assert (band_keys("∑ ∫  √ ≠") == band_keys("∑ ∫ √ ≠\n")).all()
    assert not near("∑ ∫ √ ≠ ≤ " * 40, "∑ ∫ √ ≠ ≤ " * 40 + "∞")


@pytest.mark.parametrize(
    ("share", "least", "most"),
    [(0.01, 0.95, 1.0), (0.03, 0.6, 0.95), (0.3, 0.0, 0.02), (1.0, 0.0, 0.0)],
)
def test_near_copies_share_a_band_and_others_do_not(
    share: float, least: float, most: float
) -> None:
    collisions = 0
    for seed in range(100):
        words = prose(300, seed)
        collisions += bool(
            (band_keys(" ".join(words)) == band_keys(" ".join(near_copy(words, seed, share)))).any()
        )
    assert least <= collisions / 100 <= most


def test_clusters_are_transitive_and_named_by_their_first() -> None:
    labels = clusters(8)
    for keys in ([1, 2, 3, 1, 4, 5, 6, 7], [1, 2, 3, 9, 4, 9, 6, 7], [1, 2, 8, 3, 4, 5, 8, 7]):
        join(labels, np.array(keys, dtype=np.uint64))
    assert labels.tolist() == [0, 1, 2, 0, 4, 0, 2, 7]
    draw = np.random.default_rng(0)
    chain, order = clusters(1000), draw.permutation(1000)
    for offset in (0, 1):
        keys = np.empty(1000, dtype=np.uint64)
        keys[order] = (np.arange(1000) + offset) // 2
        join(chain, keys)
    assert (chain == 0).all()


def test_signatures_never_change_between_releases() -> None:
    """A build that resumes compares new signatures with old ones."""
    assert exact_hash("A  text\n") == exact_hash("a text") == 6008937231813765456
    assert band_keys("one two three four five six seven")[:2].tolist() == [
        13379722814051649966,
        1342708022807396800,
    ]


def test_clustering_takes_few_bytes_a_document(tmp_path: Path) -> None:
    draw, units = np.random.default_rng(0), []
    for number in range(20):
        unit = Unit((), tmp_path / str(number))
        unit.folder.mkdir()
        rows = np.zeros(10_000, dtype=NEAR_ROW)
        rows["exact"] = draw.integers(2**63, size=len(rows), dtype=np.uint64)
        rows["bands"] = draw.integers(2**63, size=rows["bands"].shape, dtype=np.uint64)
        rows["bands"][::10] = rows["bands"][1::10]
        rows.tofile(unit.folder / ROWS_FILE)
        units.append(unit)
    tracemalloc.start()
    splits = split_documents(units, Filters(near=True), True, 0.01, 0.01)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert splits.counts["near_duplicate.documents"] == 20_000
    assert peak <= 104 * 200_000
