"""Documents joined end to end and cut into sequences: data.order contiguous and shuffled."""

import numpy as np

from memshard.data_pipeline.stream.batch import Batch, make_batch
from memshard.data_pipeline.stream.order.documents import MAX_BLOCK, epoch_order
from memshard.data_pipeline.stream.order.permutation import (
    BLOCK_TOKENS,
    WINDOW_TOKENS,
    permuted,
)
from memshard.data_pipeline.stream.parts import Parts, cut
from memshard.data_pipeline.stream.reader import SplitReader


class Joined:
    """An epoch's tokens, cut into `lanes` equal lanes of sequences.

    Neighbouring sequences of a lane overlap by one token, so every token but a lane's first is
    predicted once an epoch. Sequence n is number n // lanes of lane n % lanes; if `shuffled`, of a
    keyed permutation of the sequences instead, in windows of WINDOW_TOKENS. samples: sequences an
    epoch; identity: text that changes with everything that decides them.
    """

    def __init__(
        self, reader: SplitReader, length: int, lanes: int, seed: int, shuffled: bool
    ) -> None:
        self._reader, self._length, self._lanes, self._seed = reader, length, lanes, seed
        self._shuffled = shuffled
        documents, tokens = len(reader.lengths), int(reader.lengths.sum())
        self._block = (
            max(MAX_BLOCK, BLOCK_TOKENS * documents // max(tokens, 1)) if shuffled else MAX_BLOCK
        )
        # The remainder, fewer tokens than lanes, is left out; each epoch's order leaves out others.
        self._lane_tokens = tokens // lanes
        # A sequence needs a token more than it has inputs, and shares it with the next one.
        self.samples = max(self._lane_tokens - 1, 0) // length * lanes
        self._window = max(WINDOW_TOKENS // length, 1)
        # The number is the version of a rule: another rule would need another, so that no run
        # resumes on another order.
        self.identity = (
            f"shuffled 1, index {reader.index.fingerprint}, seed {seed}, length {length}"
            if shuffled
            else f"lanes 1, index {reader.index.fingerprint}, seed {seed}, length {length}, "
            f"lanes {lanes}"
        )
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def plan(self, epoch: int, numbers: np.ndarray) -> Parts:
        """Return the parts of sequences of an epoch, ascending numbers int64 [n]."""
        if self._shuffled:
            numbers = self._permuted(epoch, numbers)
        places, lanes = np.divmod(numbers, self._lanes)
        begins = lanes * self._lane_tokens + places * self._length
        return cut(self._order(epoch)[1], begins, self._length + 1)

    def batch(self, epoch: int, parts: Parts, samples: np.ndarray) -> Batch:
        """Return sequences of an epoch, as `plan` returns them, as a batch of `samples`."""
        tokens, masked = self._reader.read_parts(
            self._order(epoch)[0][parts.documents], parts.sources, parts.sizes, parts.spans
        )
        return make_batch(
            tokens.reshape(len(samples), -1),
            np.repeat(parts.documents, parts.spans).reshape(len(samples), -1),
            masked.reshape(len(samples), -1),
            samples,
        )

    def predicted(self, epoch: int, numbers: np.ndarray) -> int:
        """Return how many tokens these sequences predict."""
        return len(numbers) * self._length

    def _permuted(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        """Return the sequences at these places of the epoch."""
        # The last window takes what is left over: a short one would mix little.
        last = max(self.samples // self._window, 1) - 1
        windows = np.minimum(numbers // self._window, last)
        parts = []
        for window in range(int(windows[0]), int(windows[-1]) + 1):
            begin = window * self._window
            size = self.samples - begin if window == last else self._window
            parts.append(
                begin
                + permuted(numbers[windows == window] - begin, size, self._seed, epoch, window)
            )
        return np.concatenate(parts)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents of an epoch in order, and where each begins in the epoch's tokens.
        The last two epochs are remembered.
        """
        if epoch not in self._orders:
            while len(self._orders) > 1:
                # Two, since a batch may span the end of an epoch; an order of 10 million documents
                # has 160 MB.
                del self._orders[next(iter(self._orders))]
            order = epoch_order(
                len(self._reader.lengths), self._lanes, self._seed, epoch, self._block
            )
            self._orders[epoch] = (
                order,
                np.concatenate([[0], np.cumsum(self._reader.lengths[order])]),
            )
        return self._orders[epoch]
