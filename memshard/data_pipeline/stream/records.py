"""Streams of records (sentence pairs, images), which are neither cut nor joined: a row is one, and
a batch has records of about the same length.
"""

import hashlib
import logging
import os

import numpy as np

from memshard.data_pipeline.format.index import HELD_OUT, TRAIN
from memshard.data_pipeline.stream.batch import Batch, make_batch
from memshard.data_pipeline.stream.order.documents import epoch_order
from memshard.data_pipeline.stream.reader import TOLERANCE, SplitReader

# Records of this many batches are sorted by length: 1 or 2 % padding at 32 records a batch.
BUCKET_BATCHES = 100
MULTIPLE = 8  # to which the length of rows is rounded up
log = logging.getLogger(__name__)


class RecordStream:
    """Training records of a data folder, `size` a step; the interface of TrainStream.

    The records of an epoch are put in order as documents are, sorted by length within buckets, cut
    into batches, and the batches shuffled. Records of more than `length` + 1 tokens are left out,
    and so are the last ones if they do not fill a batch.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        length: int,
        size: int,
        seed: int,
        tolerance: float = TOLERANCE,
    ) -> None:
        for name, value, least in (
            ("data.length", length, 1),
            ("train.batch", size, 1),
            ("train.seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self._reader = SplitReader(path, TRAIN, tolerance)
        self._records = _short_enough(self._reader, length, path)
        self._size, self._seed, self._length = size, seed, length
        self._steps = len(self._records) // size
        if not self._steps:
            raise ValueError(
                f"{path} holds {len(self._records)} records of at most {length + 1} tokens, less "
                f"than train.batch {size}: lower it"
            )
        self.samples_per_epoch = self._steps * size
        self.tokenizer = self._reader.index.tokenizer_sha256
        identity = (
            f"records 1, index {self._reader.index.fingerprint}, seed {seed}, length "
            f"{length}, lanes {size}"
        )
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._epoch: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def batch(self, first: int, count: int) -> Batch:
        """Return global samples first to first + count - 1; rows are as long as the longest record
        of the steps they belong to.
        """
        if first < 0 or count < 1:
            raise ValueError(
                f"samples from {first}, {count} of them: the first must be at least 0 and the "
                "count at least 1"
            )
        samples = first + np.arange(count)
        steps = range(first // self._size, (first + count - 1) // self._size + 1)
        records = np.concatenate([self._step(step) for step in steps])
        # Over whole steps, so that all ranks and micro-batches of a step have rows of one width.
        width = _width(self._reader.lengths[records].max() - 1, self._length)
        start = first - steps[0] * self._size
        return _rows(self._reader, records[start : start + count], width, samples)

    def tokens_read(self, step: int) -> int:
        """Return the number of tokens read in a step, by all ranks; padding does not count."""
        return int((self._reader.lengths[self._step(step)] - 1).sum())

    def _step(self, step: int) -> np.ndarray:
        """Return the records of a step, int64 [size]."""
        epoch, number = divmod(step, self._steps)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._batches(epoch)
        batch: np.ndarray = self._epoch[1][number]
        return batch

    def _batches(self, epoch: int) -> np.ndarray:
        """Return the records of an epoch's steps, int64 [steps, size]."""
        order = self._records[epoch_order(len(self._records), self._size, self._seed, epoch)][
            : self.samples_per_epoch
        ]
        bucket = self._size * BUCKET_BATCHES
        for begin in range(0, len(order), bucket):
            part = order[begin : begin + bucket]
            order[begin : begin + bucket] = part[
                np.argsort(self._reader.lengths[part], kind="stable")
            ]
        # Batches are shuffled again, or an epoch would go from short records to long ones. Keys
        # from 2^41 on, apart from those of order/documents.py and mixture.py.
        keys = np.random.Philox(
            key=np.array([self._seed, (1 << 41) + epoch], dtype=np.uint64)
        ).random_raw(self._steps)
        shuffled: np.ndarray = order.reshape(self._steps, self._size)[
            np.argsort(keys, kind="stable")
        ]
        return shuffled


class HeldOutRecords:
    """The held-out records in order, one a window; the interface of HeldOutStream."""

    overlap = 0

    def __init__(
        self, path: str | os.PathLike[str], length: int, max_tokens: int | None = None
    ) -> None:
        self._reader = SplitReader(path, HELD_OUT)
        records = _short_enough(self._reader, length, path)
        if max_tokens is not None:
            records = records[
                : max(
                    int(
                        np.searchsorted(
                            np.cumsum(self._reader.lengths[records] - 1), max_tokens, side="right"
                        )
                    ),
                    1,
                )
            ]
        if not len(records):
            raise ValueError(
                f"{path} holds no held-out records of at most {length + 1} tokens: build it with "
                "a larger --held-out"
            )
        self._records = records
        self._width = _width(self._reader.lengths[records].max() - 1, length)
        self.windows = len(records)
        self.tokens = int((self._reader.lengths[records] - 1).sum())
        split = self._reader.index.splits[HELD_OUT]
        whole = len(records) == split.documents
        self.text_bytes: int | None = split.text_bytes if whole else None
        self.words: int | None = split.words if whole else None

    def batch(self, first: int, count: int) -> Batch:
        """Return windows first to first + count - 1; those past the end are filler rows (targets
        IGNORE, samples -1).
        """
        windows = first + np.arange(count)
        real = windows < self.windows
        records = self._records[np.minimum(windows, self.windows - 1)]
        batch = _rows(self._reader, records, self._width, np.where(real, windows, -1), real)
        return batch


def _short_enough(reader: SplitReader, length: int, path: str | os.PathLike[str]) -> np.ndarray:
    """Return the records of 2 to length + 1 tokens, in order."""
    # A single token predicts nothing.
    records = np.flatnonzero((reader.lengths <= length + 1) & (reader.lengths > 1))
    if len(records) < len(reader.lengths):
        log.warning(
            "%d records of %s have more than %d tokens and are left out",
            len(reader.lengths) - len(records),
            path,
            length + 1,
        )
    return records


def _width(longest: int, length: int) -> int:
    return min(-(-int(longest) // MULTIPLE) * MULTIPLE, length)


def _rows(
    reader: SplitReader,
    records: np.ndarray,
    width: int,
    samples: np.ndarray,
    real: np.ndarray | None = None,
) -> Batch:
    """Return a batch of one record a row, padded with <eos>, which is neither predicted nor
    predicted from.
    """
    lengths = reader.lengths[records]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens, _, masked = reader.read(records, starts, starts[:-1], width + 1)
    past = (
        np.arange(width + 1) >= (lengths if real is None else np.where(real, lengths, 0))[:, None]
    )
    tokens[past] = reader.index.eos_id
    return make_batch(tokens, np.zeros_like(tokens), masked | past, samples)
