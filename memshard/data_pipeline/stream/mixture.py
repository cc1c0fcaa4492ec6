"""Several corpora in fixed shares, still a pure function of (seed, sample number)."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from memshard.data_pipeline.stream.batch import Batch
from memshard.data_pipeline.stream.train_stream import TrainStream

PERIOD = 1024  # samples in which every corpus has exactly its share, rounded to 1 / PERIOD


class MixtureStream:
    """Samples of several training streams, shuffled within periods of PERIOD samples.

    weights: shares of the samples, any positive scale; with `by_epochs` how often each corpus is
    read in the time in which the mixture is read once, so that the share is that number times the
    corpus's size. The n-th sample taken from a corpus is sample n of its own stream, which begins a
    new epoch when it is through. ValueError if the corpora have different tokenizers.
    """

    def __init__(
        self,
        streams: Sequence[TrainStream],
        weights: Sequence[float],
        seed: int,
        by_epochs: bool = False,
    ) -> None:
        if len(streams) != len(weights) or not streams or min(weights) <= 0:
            raise ValueError(
                "data.mixture needs a weight above 0 for every folder, and these are "
                f"{list(weights)}"
            )
        if len({stream.tokenizer for stream in streams}) > 1:
            raise ValueError(
                "the folders of data.mixture have different tokenizers: build the others with "
                "`memshard data build --tokenizer FIRST`"
            )
        self._streams, self._seed = tuple(streams), seed
        sizes = np.array([stream.samples_per_epoch if by_epochs else 1 for stream in streams])
        self.quotas = _quotas(np.array(weights) * sizes)
        self.lanes, self.tokenizer = streams[0].lanes, streams[0].tokenizer
        passes = [
            size.samples_per_epoch * weight for size, weight in zip(streams, weights, strict=True)
        ]
        self.samples_per_epoch = (
            int(sum(passes)) if by_epochs else sum(stream.samples_per_epoch for stream in streams)
        )
        identity = (
            f"mixture 1, seed {seed}, quotas {self.quotas.tolist()}, "
            f"{[stream.fingerprint for stream in streams]}"
        )
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def batch(self, first: int, count: int) -> Batch:
        """Global samples first to first + count - 1, counted from the start of the run."""
        corpora = self.corpora(first, count)
        begin = self._taken(first)
        parts, places = [], []
        for number, stream in enumerate(self._streams):
            rows = np.flatnonzero(corpora == number)
            if len(rows):
                parts.append(stream.batch(int(begin[number]), len(rows)))
                places.append(rows)
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        mixed = Batch(*(torch.cat(fields)[back] for fields in zip(*parts, strict=True)))
        return mixed._replace(samples=torch.arange(first, first + count))

    def predicted(self, step: int) -> int:
        """Tokens predicted in a step."""
        return self._streams[0].predicted(step)

    def corpora(self, first: int, count: int) -> np.ndarray:
        """Which corpus each sample comes from, int64 [count]."""
        periods = range(first // PERIOD, (first + count - 1) // PERIOD + 1)
        start = first - periods[0] * PERIOD
        return np.concatenate([self._period(period) for period in periods])[start : start + count]

    def epochs(self, samples: int) -> list[float]:
        """How often each corpus has been read after that many samples of the mixture."""
        taken = self._taken(samples)
        return [
            float(number / stream.samples_per_epoch)
            for number, stream in zip(taken, self._streams, strict=True)
        ]

    def _period(self, period: int) -> np.ndarray:
        keys = np.random.Philox(
            key=np.array([self._seed, (1 << 40) + period], dtype=np.uint64)
        ).random_raw(PERIOD)
        return np.repeat(np.arange(len(self.quotas)), self.quotas)[np.argsort(keys, kind="stable")]

    def _taken(self, first: int) -> np.ndarray:
        period, within = divmod(first, PERIOD)
        return period * self.quotas + np.bincount(
            self._period(period)[:within], minlength=len(self.quotas)
        )


def _quotas(weights: np.ndarray) -> np.ndarray:
    """Samples of a period, by largest remainders; at least one of each corpus."""
    exact = weights / weights.sum() * PERIOD
    quotas = np.maximum(np.floor(exact), 1).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")
    for place in range(PERIOD - int(quotas.sum())):
        quotas[order[place % len(order)]] += 1
    while quotas.sum() > PERIOD:
        quotas[np.argmax(quotas)] -= 1
    return quotas
