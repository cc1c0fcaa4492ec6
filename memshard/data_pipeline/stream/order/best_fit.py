"""Whole documents packed into sequences: data.order best-fit (Ding et al. 2024)."""

from typing import NamedTuple

import numpy as np

from memshard.data_pipeline.stream.batch import IGNORE, Batch, make_batch
from memshard.data_pipeline.stream.order.packing import pack
from memshard.data_pipeline.stream.order.permutation import WINDOW_TOKENS, permuted
from memshard.data_pipeline.stream.reader import SplitReader

# Neighbouring documents that are packed together have about as many tokens, and as many groups of
# them are shuffled together as have WINDOW_TOKENS.
PACK_TOKENS = 1 << 23
_PACKS = WINDOW_TOKENS // PACK_TOKENS


class Parts(NamedTuple):
    """Parts of documents in rows; arrays int64 [parts] in the order of rows, but for the first.

    begins [rows + 1]: each row's first part. documents: their numbers. sources: first token in the
    document. columns: first place in the row. sizes: tokens.
    """

    begins: np.ndarray
    documents: np.ndarray
    sources: np.ndarray
    columns: np.ndarray
    sizes: np.ndarray


class BestFit:
    """Rows that begin with a document, or go on in one that is longer than a row.

    A long document is cut into rows from its beginning; its rest and all other documents of a pack
    of neighbours go into rows by best-fit decreasing. Every token after a document's first is
    predicted once an epoch; the first ones are where another document goes before them. The rows
    are the same in every epoch. Their order is not: packs are permuted, then the rows of some packs
    together. samples, identity: as of Joined. padding: share of the places without a token.
    """

    def __init__(self, reader: SplitReader, length: int, seed: int) -> None:
        self._reader, self._length, self._seed = reader, length, seed
        lengths = reader.lengths
        ends = np.cumsum(lengths)
        tokens = int(ends[-1]) if len(ends) else 0
        inner = np.searchsorted(ends, np.arange(PACK_TOKENS, tokens, PACK_TOKENS))
        # A document longer than a pack is one of its own, or ends one.
        self._edges = np.unique(np.concatenate([[0], inner, [len(lengths)]]))
        self._rows = np.array(
            [
                _count(lengths[begin:end], length)
                for begin, end in zip(self._edges[:-1], self._edges[1:], strict=True)
            ],
            dtype=np.int64,
        )
        self.samples = int(self._rows.sum())
        # The first token of a row that goes on in a document is the last one of the row before.
        placed = tokens + int(_whole_rows(lengths, length).sum())
        self.padding = 1 - placed / max(self.samples * (length + 1), 1)
        # As of Joined: the version of this rule.
        self.identity = (
            f"best-fit 1, index {reader.index.fingerprint}, seed {seed}, length {length}"
        )
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._plans: dict[tuple[int, int], Parts] = {}

    def batch(self, epoch: int, numbers: np.ndarray, samples: np.ndarray) -> Batch:
        """Return rows of an epoch, ascending numbers int64 [n], as a batch of `samples`."""
        parts, width = self._parts(epoch, numbers), self._length + 1
        counts = np.diff(parts.begins)
        rows = np.repeat(np.arange(len(numbers)), counts)
        tokens, masked = self._reader.read_parts(
            parts.documents,
            parts.sources,
            rows * width + parts.columns,
            parts.sizes,
            len(numbers) * width,
        )
        tokens, masked = tokens.reshape(-1, width), masked.reshape(-1, width)
        used = np.add.reduceat(parts.sizes, parts.begins[:-1])
        masked |= np.arange(width) >= used[:, None]
        # Padding goes on with the number of the document before it.
        sizes = parts.sizes.copy()
        sizes[parts.begins[1:] - 1] += width - used
        documents = np.repeat(parts.documents, sizes).reshape(-1, width)
        batch = make_batch(tokens, documents, masked, samples)
        twice = _goes_on(parts)
        batch.targets.numpy()[rows[twice], parts.columns[twice] - 1] = IGNORE
        return batch

    def predicted(self, epoch: int, numbers: np.ndarray) -> int:
        """Return how many tokens these rows predict."""
        parts = self._parts(epoch, numbers)
        return int(parts.sizes.sum()) - len(numbers) - int(_goes_on(parts).sum())

    def _parts(self, epoch: int, numbers: np.ndarray) -> Parts:
        """Return the parts in these rows of an epoch."""
        order, edges = self._order(epoch)
        groups = np.searchsorted(edges, numbers, side="right") - 1
        last = len(edges) - 2
        chosen = []
        for group in range(int(groups[0]), int(groups[-1]) + 1):
            begin, end = int(edges[group]), int(edges[group + 1])
            places = numbers[groups == group] - begin
            rows = permuted(places, end - begin, self._seed, epoch, group)
            packs = order[group * _PACKS : None if group == last else (group + 1) * _PACKS]
            chosen.append(_take(self._plan(epoch, group, packs), rows))
        return chosen[0] if len(chosen) == 1 else _join(chosen)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the packs in the order of an epoch, and the first row of each group that is
        shuffled together, with the number of rows at the end. The last two epochs are remembered.
        """
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            # Apart from the keys of documents.py, mixture.py, records.py and permutation.py.
            key = np.array([self._seed, (1 << 43) + epoch], dtype=np.uint64)
            random = np.random.Philox(key=key).random_raw(len(self._rows))
            order = np.argsort(random, kind="stable")
            rows = self._rows[order]
            # The last group takes what is left over: a short one would mix little.
            groups = max(len(order) // _PACKS, 1)
            firsts = (np.cumsum(rows) - rows)[: groups * _PACKS : _PACKS]
            self._orders[epoch] = order, np.append(firsts, self.samples)
        return self._orders[epoch]

    def _plan(self, epoch: int, group: int, packs: np.ndarray) -> Parts:
        """Return the rows of some packs. The last two groups are remembered, since a batch may span
        the end of one: 40 bytes a part.
        """
        if (epoch, group) not in self._plans:
            while len(self._plans) > 1:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch, group] = _join(
                [
                    _pack_rows(
                        self._reader.lengths,
                        int(self._edges[pack]),
                        int(self._edges[pack + 1]),
                        self._length,
                    )
                    for pack in packs
                ]
            )
        return self._plans[epoch, group]


def _whole_rows(lengths: np.ndarray, length: int) -> np.ndarray:
    """Return the rows that each document fills before its rest of 1 to length + 1 tokens."""
    # A row predicts `length` tokens, and n tokens are n - 1 to predict: of length + 2 tokens one is
    # left over.
    return np.maximum(lengths - 2, 0) // length


def _count(lengths: np.ndarray, length: int) -> int:
    """Return the number of rows that documents of these lengths are packed into."""
    whole = _whole_rows(lengths, length)
    counts = np.bincount(lengths - whole * length, minlength=length + 2)
    return int(whole.sum()) + pack(counts, length + 1)[1]


def _pack_rows(lengths: np.ndarray, first: int, stop: int, length: int) -> Parts:
    """Return the rows of documents first to stop - 1."""
    lengths = lengths[first:stop]
    whole = _whole_rows(lengths, length)
    rests = lengths - whole * length
    counts = np.bincount(rests, minlength=length + 2)
    places, bins = pack(counts, length + 1)
    # Those of falling size, as `pack` places them; empty documents are last and left out.
    items = np.argsort(-rests, kind="stable")[: len(rests) - counts[0]]
    bin_of = np.concatenate(
        [np.zeros(0, dtype=np.int64)]
        + [first_bin + np.arange(count) // each for count, first_bin, each in places]
    )
    by_bin = np.argsort(bin_of, kind="stable")
    items, in_bins = items[by_bin], np.bincount(bin_of, minlength=bins)
    starts = np.cumsum(in_bins) - in_bins
    ends = np.cumsum(rests[items])
    columns = ends - rests[items]
    columns -= np.repeat(columns[starts], in_bins)

    longs = np.repeat(np.arange(len(lengths)), whole)
    within = np.arange(len(longs)) - np.repeat(np.cumsum(whole) - whole, whole)
    return Parts(
        begins=np.concatenate(
            [np.arange(len(longs)), len(longs) + starts, [len(longs) + len(items)]]
        ),
        documents=first + np.concatenate([longs, items]),
        sources=length * np.concatenate([within, whole[items]]),
        columns=np.concatenate([np.zeros_like(longs), columns]),
        sizes=np.concatenate([np.full_like(longs, length + 1), rests[items]]),
    )


def _take(parts: Parts, rows: np.ndarray) -> Parts:
    """Return the parts of some rows."""
    starts = parts.begins[rows]
    counts = parts.begins[rows + 1] - starts
    begins = np.concatenate([[0], np.cumsum(counts)])
    chosen = np.arange(begins[-1]) + np.repeat(starts - begins[:-1], counts)
    return Parts(begins, *(field[chosen] for field in parts[1:]))


def _join(plans: list[Parts]) -> Parts:
    """Return the rows of all plans, one after the other."""
    offsets = np.cumsum([0] + [plan.begins[-1] for plan in plans])
    begins = [plan.begins[:-1] + offset for plan, offset in zip(plans, offsets, strict=False)]
    return Parts(
        np.concatenate([*begins, offsets[-1:]]),
        *(np.concatenate(fields) for fields in zip(*(plan[1:] for plan in plans), strict=True)),
    )


def _goes_on(parts: Parts) -> np.ndarray:
    """Return which parts go on in a document behind another part of their row: their first token is
    predicted in the row before theirs, bool [parts].
    """
    goes_on: np.ndarray = (parts.sources > 0) & (parts.columns > 0)
    return goes_on
