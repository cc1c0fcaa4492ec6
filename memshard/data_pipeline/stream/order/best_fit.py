"""Whole documents packed into sequences: data.order best-fit (Ding et al. 2024)."""

import numpy as np

from memshard.data_pipeline.stream.batch import IGNORE, Batch, make_batch
from memshard.data_pipeline.stream.order.packing import pack
from memshard.data_pipeline.stream.order.permutation import BLOCK_TOKENS, WINDOW_TOKENS, permuted
from memshard.data_pipeline.stream.parts import Parts, join, take
from memshard.data_pipeline.stream.reader import SplitReader

# Documents are packed together by blocks of neighbours, from all over the corpus: 32 blocks of 2^20
# tokens, about as many as a fetch of a remote corpus. Larger packs have fewer sizes to count: 40
# million documents take seconds. Two packs are shuffled together.
PACK_BLOCKS = 32
_PACKS = WINDOW_TOKENS // (PACK_BLOCKS * BLOCK_TOKENS)


class BestFit:
    """Rows that begin with a document, or go on in one that is longer than a row.

    A long document is cut into rows from its beginning; its rest and all other documents of a pack
    go into rows by best-fit decreasing. Every token after a document's first is
    predicted once an epoch; the first ones are where another document goes before them. The rows
    are the same in every epoch. Their order is not: packs are permuted, then the rows of some packs
    together. samples, identity: as of Joined. padding: share of the places without a token.
    """

    def __init__(self, reader: SplitReader, length: int, seed: int) -> None:
        self._reader, self._length, self._seed = reader, length, seed
        ends = np.cumsum(reader.lengths)
        tokens = int(ends[-1]) if len(ends) else 0
        inner = np.searchsorted(ends, np.arange(BLOCK_TOKENS, tokens, BLOCK_TOKENS))
        # A document longer than a block leaves none between its ends.
        self._edges = np.unique(np.concatenate([[0], inner, [len(ends)]]))
        self._packs = -(-(len(self._edges) - 1) // PACK_BLOCKS)
        counts = [self._count(pack) for pack in range(self._packs)]
        self._rows = np.array([rows for rows, _ in counts], dtype=np.int64)
        self.samples = int(self._rows.sum())
        # The first token of a row that goes on in a document is the last one of the row before.
        self.padding = 1 - (tokens + sum(filled for _, filled in counts)) / max(
            self.samples * (length + 1), 1
        )
        # As of Joined: the version of this rule.
        self.identity = (
            f"best-fit 1, index {reader.index.fingerprint}, seed {seed}, length {length}"
        )
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._plans: dict[tuple[int, int], Parts] = {}

    def plan(self, epoch: int, numbers: np.ndarray) -> Parts:
        """Return the parts of rows of an epoch, ascending numbers int64 [n]."""
        return join([take(*chosen) for chosen in self._rows_of(epoch, numbers)])

    def batch(self, epoch: int, parts: Parts, samples: np.ndarray) -> Batch:
        """Return rows of an epoch, as `plan` returns them, as a batch of `samples`."""
        width = self._length + 1
        tokens, masked = self._reader.read_parts(
            parts.documents, parts.sources, parts.sizes, parts.spans
        )
        batch = make_batch(
            tokens.reshape(-1, width),
            # Padding goes on with the number of the document before it.
            np.repeat(parts.documents, parts.spans).reshape(-1, width),
            masked.reshape(-1, width),
            samples,
        )
        goes_on = _goes_on(parts)
        if goes_on.any():
            rows, columns = np.divmod((np.cumsum(parts.spans) - parts.spans)[goes_on], width)
            batch.targets.numpy()[rows, columns - 1] = IGNORE
        return batch

    def predicted(self, epoch: int, numbers: np.ndarray) -> int:
        """Return how many tokens these rows predict."""
        return sum(int(plan.predicted[rows].sum()) for plan, rows in self._rows_of(epoch, numbers))

    def _rows_of(self, epoch: int, numbers: np.ndarray) -> list[tuple[Parts, np.ndarray]]:
        """Return the plans that have these rows of an epoch, and which of their rows those are."""
        order, edges = self._order(epoch)
        groups = np.searchsorted(edges, numbers, side="right") - 1
        last = len(edges) - 2
        chosen = []
        for group in range(int(groups[0]), int(groups[-1]) + 1):
            begin, end = int(edges[group]), int(edges[group + 1])
            places = numbers[groups == group] - begin
            rows = permuted(places, end - begin, self._seed, epoch, group)
            packs = order[group * _PACKS : None if group == last else (group + 1) * _PACKS]
            chosen.append((self._plan(epoch, group, packs), rows))
        return chosen

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the packs in the order of an epoch, and the first row of each group that is
        shuffled together, with the number of rows at the end. The last two epochs are remembered.
        """
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            # Apart from the keys of documents.py, mixture.py, records.py and permutation.py.
            key = np.array([self._seed, (1 << 43) + epoch], dtype=np.uint64)
            random = np.random.Philox(key=key).random_raw(self._packs)
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
            self._plans[epoch, group] = join([self._pack_rows(int(pack)) for pack in packs])
        return self._plans[epoch, group]

    def _documents(self, pack: int) -> np.ndarray:
        """Return the documents of a pack: blocks at equal distances."""
        blocks = range(pack, len(self._edges) - 1, self._packs)
        ranges = [np.arange(self._edges[block], self._edges[block + 1]) for block in blocks]
        return np.concatenate(ranges)

    def _sizes(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows that each document fills before its rest of at most length + 1 tokens,
        the size of its rest, and how many have each size.
        """
        lengths = self._reader.lengths[documents]
        # A row predicts `length` tokens, and of n tokens n - 1 are predicted: length + 2 tokens
        # leave one to predict, a rest of two.
        whole = np.maximum(lengths - 2, 0) // self._length
        rests = lengths - whole * self._length
        return whole, rests, np.bincount(rests, minlength=self._length + 2)

    def _count(self, pack_number: int) -> tuple[int, int]:
        """Return the number of rows of a pack, and of those that long documents fill."""
        whole, _, counts = self._sizes(self._documents(pack_number))
        filled = int(whole.sum())
        return filled + pack(counts, self._length + 1)[1], filled

    def _pack_rows(self, pack_number: int) -> Parts:
        """Return the rows of a pack."""
        documents, length = self._documents(pack_number), self._length
        whole, rests, counts = self._sizes(documents)
        places, bins = pack(counts, length + 1)
        # Those of falling size, as `pack` places them; empty documents are last and left out.
        items = np.argsort(-rests, kind="stable")[: len(rests) - counts[0]]
        bin_of = np.concatenate(
            [np.zeros(0, dtype=np.int64)]
            + [first + np.arange(count) // each for count, first, each in places]
        )
        by_bin = np.argsort(bin_of, kind="stable")
        items, in_bins = items[by_bin], np.bincount(bin_of, minlength=bins)
        starts = np.cumsum(in_bins) - in_bins
        longs = np.repeat(np.arange(len(documents)), whole)
        within = np.arange(len(longs)) - np.repeat(np.cumsum(whole) - whole, whole)
        begins = np.concatenate([np.arange(len(longs)), len(longs) + starts])
        sizes = np.concatenate([np.full_like(longs, length + 1), rests[items]])
        spans = sizes.copy()
        if len(begins):
            spans[np.append(begins[1:], len(sizes)) - 1] += (
                length + 1 - np.add.reduceat(sizes, begins)
            )
        parts = Parts(
            begins=np.append(begins, len(sizes)),
            predicted=begins,
            documents=documents[np.concatenate([longs, items])],
            sources=length * np.concatenate([within, whole[items]]),
            sizes=sizes,
            spans=spans,
        )
        # Without the first token of a row, and of what goes on in a document inside a row.
        predicted = np.add.reduceat(parts.sizes - _goes_on(parts), begins) - 1
        return parts._replace(predicted=predicted)


def _goes_on(parts: Parts) -> np.ndarray:
    """Return which parts go on in a document behind another part of their row: their first token is
    predicted in the row before theirs, bool [parts].
    """
    goes_on: np.ndarray = parts.sources > 0
    goes_on[parts.begins[:-1]] = False
    return goes_on
