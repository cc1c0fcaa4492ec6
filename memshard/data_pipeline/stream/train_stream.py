"""The training stream: any sample of any epoch by its number, with nothing to replay and no state
but that number.
"""

import hashlib
import os

import numpy as np
from torch import Tensor

from memshard.data_pipeline.format.index import TRAIN
from memshard.data_pipeline.stream.batch import Batch, make_batch
from memshard.data_pipeline.stream.epoch_order import epoch_order
from memshard.data_pipeline.stream.reader import TOLERANCE, SplitReader


class TrainStream:
    """Packed training sequences of a data folder.

    `lanes` is the global batch size in sequences: a batch takes one sequence of each lane, and
    sample s is at position s // lanes of lane s % lanes. Neighbouring sequences of a lane overlap
    by one token, so every token but a lane's first is predicted once an epoch. Which samples a rank
    reads is the caller's arithmetic: nothing here knows about ranks. tolerance: share of the tokens
    that may be damaged, see SplitReader.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        length: int,
        lanes: int,
        seed: int,
        tolerance: float = TOLERANCE,
    ) -> None:
        for name, value, least in (
            ("data.length", length, 1),
            ("train.batch", lanes, 1),
            ("train.seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self._reader = SplitReader(path, TRAIN, tolerance)
        self._length, self.lanes, self._seed = length, lanes, seed
        self.tokenizer = self._reader.index.tokenizer_sha256
        tokens = int(self._reader.lengths.sum())
        self._lane_tokens = tokens // lanes
        positions = (self._lane_tokens - 1) // length
        if positions < 1:
            raise ValueError(
                f"{path} holds {tokens:,} training tokens, too few for one step of train.batch "
                f"{lanes} x data.length {length} "
                f"(+ 1 each, {lanes * (length + 1):,} tokens): lower train.batch or data.length, "
                "or build from more text"
            )
        self.samples_per_epoch = positions * lanes
        identity = (
            f"lanes 1, index {self._reader.index.fingerprint}, seed {seed}, length "
            f"{length}, lanes {lanes}"
        )
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def batch(self, first: int, count: int) -> Batch:
        """Global samples first to first + count - 1, counted from the start of the run, over epoch
        ends.
        """
        if first < 0 or count < 1:
            raise ValueError(
                f"samples from {first}, {count} of them: the first must be at least 0 and the "
                "count at least 1"
            )
        samples = first + np.arange(count)
        epochs, within = np.divmod(samples, self.samples_per_epoch)
        begins = within % self.lanes * self._lane_tokens + within // self.lanes * self._length
        parts = [
            self._reader.read(*self._order(int(epoch)), begins[epochs == epoch], self._length + 1)
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        tokens, documents, masked = (np.concatenate(fields) for fields in zip(*parts, strict=True))
        return make_batch(tokens, documents, masked, samples)

    def continues(self, samples: Tensor) -> Tensor:
        """Which samples go on where the one `lanes` before them, their lane's last, ended; the
        others begin an epoch.

        Bool of the shape of `samples`. What is carried from step to step belongs to a lane, samples
        % lanes: that is a row of the global batch, whatever the number of ranks, and starts afresh
        where this is False.
        """
        return samples % self.samples_per_epoch >= self.lanes

    def predicted(self, step: int) -> int:
        """Tokens predicted in a step."""
        return self.lanes * self._length

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of an epoch in order and where each begins in the epoch's tokens; the last two
        epochs are kept.
        """
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            order = epoch_order(len(self._reader.lengths), self.lanes, self._seed, epoch)
            self._orders[epoch] = (
                order,
                np.concatenate([[0], np.cumsum(self._reader.lengths[order])]),
            )
        return self._orders[epoch]
