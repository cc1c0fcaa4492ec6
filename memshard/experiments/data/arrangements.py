"""Arrangements of training sequences that single out what differs between the orders."""

from typing import Any

import numpy as np
import torch

from memshard.data_pipeline.stream import Batch, TrainStream
from memshard.data_pipeline.stream.order.permutation import permuted
from memshard.data_pipeline.stream.train_stream import ORDERS

PERMUTED, BURSTS = "contiguous, permuted", "contiguous, bursts"
ARRANGEMENTS: tuple[str, ...] = (*ORDERS, PERMUTED, BURSTS)
"""The orders; the sequences that a run in contiguous order reads, permuted over its steps: the same
text without its bursts; and lanes that jump to another place every BURST steps: bursts as short,
and text of as many documents as they allow.
"""
BURST = 8


class Rearranged(TrainStream):
    """The contiguous stream in another arrangement: sample n is its sample places[n]."""

    def __init__(self, path: str, length: int, batch: int, seed: int, places: np.ndarray) -> None:
        super().__init__(path, length, batch, seed)
        self._places = places

    def batch(self, first: int, count: int) -> Batch:
        """Return the samples `first` to first + count - 1 of the arrangement."""
        rows = [
            super(Rearranged, self).batch(int(place), 1)
            for place in self._places[first : first + count]
        ]
        joined = Batch(*(torch.cat(fields) for fields in zip(*rows, strict=True)))
        return joined._replace(samples=torch.arange(first, first + count))


def open_arranged(
    path: str, length: int, batch: int, seed: int, steps: int, arrangement: str
) -> TrainStream:
    """Return a run's training stream in one of ARRANGEMENTS."""
    if arrangement in ORDERS:
        return TrainStream(path, length, batch, seed, order=arrangement)
    count = steps * batch
    if arrangement == PERMUTED:
        return Rearranged(path, length, batch, seed, permuted(np.arange(count), count, seed, 0, 0))
    bursts = TrainStream(path, length, batch, seed).samples_per_epoch // batch // BURST
    number, step = np.divmod(np.arange(steps), BURST)
    lanes = [
        (permuted(number % bursts, bursts, seed, 0, lane) * BURST + step) * batch + lane
        for lane in range(batch)
    ]
    return Rearranged(path, length, batch, seed, np.stack(lanes, axis=1).ravel())


def token_shares(path: str) -> np.ndarray:
    """Return each token's share of the training text, from a million tokens of it or all."""
    stream = TrainStream(path, 256, 1, 0, order="shuffled")
    tokens = stream.batch(0, min(4096, stream.samples_per_epoch)).inputs.numpy()
    counts = np.bincount(tokens.ravel(), minlength=int(tokens.max()) + 1)
    return counts / counts.sum()


def repeats(stream: TrainStream, steps: int, batch: int, shares: np.ndarray) -> dict[str, Any]:
    """Return what the steps of a stream have in common.

    documents: how many different ones an epoch's steps meet. rare: different tokens in a step of
    which a step has less than one in two on average; again_1, again_10: the share of those that the
    step before and the tenth before had as well.
    """
    documents: set[int] = set()
    rare: list[np.ndarray] = []
    for step in range(min(steps, stream.samples_per_epoch // batch)):
        rows = stream.batch(step * batch, batch)
        documents.update(rows.documents.unique().tolist())
        tokens = rows.inputs.unique().numpy()
        seldom = shares[np.minimum(tokens, len(shares) - 1)] * rows.inputs.numel() < 0.5
        rare.append(tokens[seldom])

    def again(distance: int) -> float | None:
        pairs = list(zip(rare[distance:], rare, strict=False))
        met = [np.isin(late, early).mean() for late, early in pairs if len(late)]
        return float(np.mean(met)) if met else None

    return {
        "documents": len(documents),
        "rare": float(np.mean([len(tokens) for tokens in rare])),
        "again_1": again(1),
        "again_10": again(10),
    }
