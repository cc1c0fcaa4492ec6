"""Which documents stay, and which are for training, held out or for testing: decided over all units
at once.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from memshard.data_pipeline.prepare.documents import Filters, Unit, read_rows
from memshard.data_pipeline.prepare.duplicates import BANDS, clusters, join

DROPPED, TRAIN_SIDE, HELD_OUT_SIDE, TEST_SIDE = range(4)

AMOUNT = "it is a share of the documents, above 0 and below 1, or a number of documents"


@dataclass(frozen=True)
class Splits:
    """The documents of all units, in order. sides: uint8 [documents], DROPPED or one of the three
    sides; first: int64 [units + 1], where each unit's documents begin; sizes: uint32 [documents],
    in bytes; words: [documents]; hashes: uint64 [documents]; counts: documents and bytes dropped as
    `exact_duplicate` and `near_duplicate`.
    """

    sides: np.ndarray
    first: np.ndarray
    sizes: np.ndarray
    words: np.ndarray
    hashes: np.ndarray
    counts: Counter[str]


def split_documents(
    units: list[Unit],
    filters: Filters,
    deduplicate: bool | Literal["web"],
    held_out: float,
    test: float,
) -> Splits:
    """Keep the first document of every cluster of duplicates, and choose the held-out and test
    documents by their hashes. deduplicate: "web" keeps all documents that are not of the web.

    held_out, test: below 1 a share of the documents, else their number. Takes some 90 bytes of
    memory a document.
    """
    lengths, words, exact = (_column(units, filters, name) for name in ("bytes", "words", "exact"))
    first = np.cumsum([0, *(len(read_rows(unit, filters)) for unit in units)])
    counts: Counter[str] = Counter()
    keep = np.ones(len(exact), dtype=bool)
    if deduplicate:
        # A cluster's label is its first document, the one that stays.
        labels = clusters(len(exact))
        join(labels, exact)
        others = np.repeat(
            [deduplicate == "web" and not unit.web for unit in units], np.diff(first)
        )
        keep = (labels == np.arange(len(labels))) | others
        _count(counts, "exact_duplicate", lengths[~keep])
        if filters.near:
            for band in range(BANDS):  # one at a time: 8 bytes a document
                join(labels, _column(units, filters, "bands", band))
            alone = (labels == np.arange(len(labels))) | others
            _count(counts, "near_duplicate", lengths[keep & ~alone])
            keep = alone
    sides = np.where(keep, choose_sides(exact, keep, held_out, test), DROPPED).astype(np.uint8)
    return Splits(sides, first, lengths, words, exact, counts)


def _column(
    units: list[Unit], filters: Filters, name: str, number: int | None = None
) -> np.ndarray:
    """Return a column of the rows of all units, [documents]; number: which of several."""
    columns = (read_rows(unit, filters)[name] for unit in units)
    # Copied: a view would keep the rows of all units in memory.
    return np.concatenate(
        [column.copy() if number is None else column[:, number].copy() for column in columns]
    )


def check_amounts(held_out: float | None, test: float | None) -> None:
    """Raise ValueError unless the amounts are shares below 1 or whole numbers of documents; None is
    a default.
    """
    for name, amount in (("--held-out", held_out), ("--test", test)):
        if amount is not None and not (
            0 <= amount < 1 or (math.isfinite(amount) and amount >= 1 and amount == int(amount))
        ):
            raise ValueError(f"{name} is {amount}; {AMOUNT}")
    if held_out == 0:
        raise ValueError(f"--held-out is {held_out}; {AMOUNT}")


def choose_sides(hashes: np.ndarray, keep: np.ndarray, held_out: float, test: float) -> np.ndarray:
    """Return TRAIN_SIDE, HELD_OUT_SIDE or TEST_SIDE of every document, by the order of the kept
    ones' hashes, so that equal documents are on one side.

    ValueError with the fix if nothing would be left to train on.
    """
    # By rank of the hash and not by document: copies of a text have one hash, so none is trained on
    # while another is held out.
    kept = np.unique(hashes[keep])
    if not len(kept):
        return np.full(len(hashes), DROPPED)
    if len(kept) == 1:
        raise ValueError(
            f"the corpus is one document ({keep.sum()} times), so none is left to train on after "
            "the held-out split: "
            "give more text, or take every line as a document with --documents line"
        )
    held_out_end = max(_number(held_out, len(kept)), 1)
    test_end = held_out_end + _number(test, len(kept))
    if test_end >= len(kept):
        raise ValueError(
            f"all {len(kept)} different documents fall into the held-out split: lower --held-out "
            "and --test, or give more documents"
        )
    rank = np.searchsorted(kept, hashes)
    return np.where(
        rank < held_out_end, HELD_OUT_SIDE, np.where(rank < test_end, TEST_SIDE, TRAIN_SIDE)
    )


def _number(amount: float, documents: int) -> int:
    return int(amount) if amount >= 1 else round(amount * documents)


def _count(counts: Counter[str], name: str, sizes: np.ndarray) -> None:
    counts[f"{name}.documents"] += len(sizes)
    counts[f"{name}.bytes"] += int(sizes.sum())
