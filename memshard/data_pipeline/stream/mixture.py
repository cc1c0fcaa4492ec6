"""Several corpora in fixed shares; which sample comes from which is a function of the seed."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from memshard.data_pipeline.stream.batch import Batch
from memshard.data_pipeline.stream.train_stream import TrainStream

PERIOD = 1024  # samples; each period has every corpus's exact share, rounded to 1 / PERIOD


class MixtureStream:
    """Samples of several training streams, shuffled within periods of PERIOD samples.

    weights: shares of the samples, on any positive scale; with `by_epochs` the number of epochs of
    each corpus per epoch of the mixture, so that its share is that number times its size. The n-th
    sample taken from a corpus is sample n of its own stream, which continues with a new epoch at
    its end. ValueError if the corpora have different tokenizers or a share is below 1 / PERIOD.
    """

    def __init__(
        self,
        streams: Sequence[TrainStream],
        weights: Sequence[float],
        seed: int,
        by_epochs: bool = False,
    ) -> None:
        positive = all(0 < weight < math.inf for weight in weights)
        if len(streams) != len(weights) or not streams or not positive:
            raise ValueError(
                "data.mixture needs a finite weight above 0 for every folder, and these are "
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
        self.tokenizer = streams[0].tokenizer
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
        """Return global samples first to first + count - 1, counted from the start of the run."""
        corpora = self.corpora(first, count)
        begin = self._taken(first)
        batches, rows = [], []
        for number, stream in enumerate(self._streams):
            of_stream = np.flatnonzero(corpora == number)
            if len(of_stream):
                batches.append(stream.batch(int(begin[number]), len(of_stream)))
                rows.append(of_stream)
        # Rows come grouped by corpus; the argsort of their places puts them back in order.
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))
        mixed = Batch(*(torch.cat(fields)[back] for fields in zip(*batches, strict=True)))
        return mixed._replace(samples=torch.arange(first, first + count))

    def tokens_read(self, step: int) -> int:
        """Return the number of tokens read to predict them in a step, by all ranks."""
        batch = self._streams[0].text_lanes
        begin, end = self._taken(step * batch), self._taken((step + 1) * batch)
        return sum(
            stream.predicted(int(first), int(last - first))
            for stream, first, last in zip(self._streams, begin, end, strict=True)
            if last > first
        )

    def corpora(self, first: int, count: int) -> np.ndarray:
        """Return the number of the corpus that each sample comes from, int64 [count]."""
        periods = range(first // PERIOD, (first + count - 1) // PERIOD + 1)
        start = first - periods[0] * PERIOD
        return np.concatenate([self._period(period) for period in periods])[start : start + count]

    def epochs(self, samples: int) -> list[float]:
        """Return how many epochs of each corpus that many samples of the mixture are."""
        taken = self._taken(samples)
        return [
            float(number / stream.samples_per_epoch)
            for number, stream in zip(taken, self._streams, strict=True)
        ]

    def _period(self, period: int) -> np.ndarray:
        """Return the corpus of each sample of a period, int64 [PERIOD]."""
        # Keys from 2^40 on, apart from those of epochs (order/documents.py) for the same seed.
        keys = np.random.Philox(
            key=np.array([self._seed, (1 << 40) + period], dtype=np.uint64)
        ).random_raw(PERIOD)
        return np.repeat(np.arange(len(self.quotas)), self.quotas)[np.argsort(keys, kind="stable")]

    def _taken(self, first: int) -> np.ndarray:
        """Return how many samples of each corpus come before sample `first`."""
        period, within = divmod(first, PERIOD)
        # Periods have exact quotas, so only the last one is counted: any sample is reached at once.
        return period * self.quotas + np.bincount(
            self._period(period)[:within], minlength=len(self.quotas)
        )


def _quotas(weights: np.ndarray) -> np.ndarray:
    """Return each corpus's samples in a period, by largest remainders. ValueError if one would have
    less than one sample.
    """
    exact = weights / weights.sum() * PERIOD
    if exact.min() < 1 - 1e-9:  # shares of 1 / PERIOD may be rounded
        raise ValueError(
            f"folder {int(exact.argmin()) + 1} of data.mixture has a share of "
            f"{exact.min() / PERIOD:.2g}, and the smallest is 1 sample in {PERIOD:,}: raise its "
            "weight or leave it out"
        )
    quotas = np.floor(exact).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")
    for place in range(PERIOD - int(quotas.sum())):
        quotas[order[place % len(order)]] += 1
    return quotas
