"""The training stream over texts: any sample of any epoch by its number, without other state."""

import hashlib
import os

import numpy as np
from torch import Tensor

from memshard.data_pipeline.format.index import TRAIN
from memshard.data_pipeline.stream.batch import Batch, make_batch
from memshard.data_pipeline.stream.epoch_order import epoch_order
from memshard.data_pipeline.stream.reader import TOLERANCE, SplitReader


class TrainStream:
    """Training sequences of a data folder whose texts are packed: joined end to end and cut.

    An epoch's tokens are cut into `text_lanes` equal lanes, as many as the global batch has
    sequences. A batch takes one sequence of each lane, so that row r of a batch continues row r of
    the one before: sample s is number s // text_lanes of lane s % text_lanes. Neighbouring
    sequences of a lane overlap by one token, so every token but a lane's first is predicted once an
    epoch. Nothing here knows about ranks (`rank_share` does). tolerance: share of the tokens that
    may be damaged, see SplitReader.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        length: int,
        text_lanes: int,
        seed: int,
        tolerance: float = TOLERANCE,
    ) -> None:
        for name, value, least in (
            ("data.length", length, 1),
            ("train.batch", text_lanes, 1),
            ("train.seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self._reader = SplitReader(path, TRAIN, tolerance)
        self._length, self.text_lanes, self._seed = length, text_lanes, seed
        self.tokenizer = self._reader.index.tokenizer_sha256
        tokens = int(self._reader.lengths.sum())
        # The remainder, fewer tokens than lanes, is left out; each epoch's order leaves out others.
        self._lane_tokens = tokens // text_lanes
        # A sequence needs a token more than it has inputs, and shares it with the next one.
        positions = (self._lane_tokens - 1) // length
        if positions < 1:
            raise ValueError(
                f"{path} holds {tokens:,} training tokens, too few for one step of train.batch "
                f"{text_lanes} x data.length {length} (+ 1 each, {text_lanes * (length + 1):,} "
                "tokens): lower train.batch or data.length, or build from more text"
            )
        self.samples_per_epoch = positions * text_lanes
        identity = (
            # "lanes 1" is the version of this rule: another rule would need another, so that no run
            # resumes on another order.
            f"lanes 1, index {self._reader.index.fingerprint}, seed {seed}, length "
            f"{length}, lanes {text_lanes}"
        )
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def batch(self, first: int, count: int) -> Batch:
        """Return global samples first to first + count - 1, counted from the start of the run and
        on over the ends of epochs.
        """
        if first < 0 or count < 1:
            raise ValueError(
                f"samples from {first}, {count} of them: the first must be at least 0 and the "
                "count at least 1"
            )
        samples = first + np.arange(count)
        epochs, within = np.divmod(samples, self.samples_per_epoch)
        lane, number = within % self.text_lanes, within // self.text_lanes
        begins = lane * self._lane_tokens + number * self._length
        parts = [
            self._reader.read(*self._order(int(epoch)), begins[epochs == epoch], self._length + 1)
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        tokens, documents, masked = (np.concatenate(fields) for fields in zip(*parts, strict=True))
        return make_batch(tokens, documents, masked, samples)

    def continues(self, samples: Tensor) -> Tensor:
        """Tell which samples continue the one `text_lanes` before them, the last of their lane; the
        others begin an epoch. Bool of the shape of `samples`.

        A state carried from step to step belongs to a lane, samples % text_lanes: a row of the
        global batch, whatever the number of ranks. It starts afresh where this is False.
        """
        return samples % self.samples_per_epoch >= self.text_lanes

    def tokens_read(self, step: int) -> int:
        """Return the number of tokens read in a step, by all ranks."""
        return self.text_lanes * self._length

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents of an epoch in order, and where each begins in the epoch's tokens.
        The last two epochs are remembered.
        """
        if epoch not in self._orders:
            while len(self._orders) > 1:
                # Two, since a batch may span the end of an epoch; an order of 10 million documents
                # has 160 MB.
                del self._orders[next(iter(self._orders))]
            order = epoch_order(len(self._reader.lengths), self.text_lanes, self._seed, epoch)
            self._orders[epoch] = (
                order,
                np.concatenate([[0], np.cumsum(self._reader.lengths[order])]),
            )
        return self._orders[epoch]
