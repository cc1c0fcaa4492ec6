"""The training stream over texts: any sample of any epoch by its number, without other state."""

import hashlib
import os
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from memshard.data_pipeline.format.index import TRAIN
from memshard.data_pipeline.format.kinds import Order
from memshard.data_pipeline.stream.batch import Batch
from memshard.data_pipeline.stream.order.best_fit import BestFit
from memshard.data_pipeline.stream.order.joined import Joined
from memshard.data_pipeline.stream.parts import Parts, take_range
from memshard.data_pipeline.stream.reader import TOLERANCE, SplitReader

ORDERS: tuple[Order, ...] = get_args(Order)[1:]
PLANNED_STEPS, PLANNED_ROWS = 16, 1024  # at most as many, planned at once
MAX_PLANNED = 1 << 16  # rows that are remembered, of some 50 bytes


class TrainStream:
    """Training sequences of a data folder of texts.

    order: contiguous, an epoch's documents are joined and cut into `text_lanes` equal lanes, as
    many as the global batch has sequences, and a batch takes one sequence of each lane, so that row
    r of a batch continues row r of the one before; shuffled, they are joined and cut in one lane,
    whose sequences are permuted; best-fit, whole documents are packed into sequences, which are
    permuted. Nothing here knows about ranks (`rank_share` does). tolerance: share of the tokens
    that may be damaged, see SplitReader.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        length: int,
        text_lanes: int,
        seed: int,
        tolerance: float = TOLERANCE,
        order: Order = "contiguous",
    ) -> None:
        for name, value, least in (
            ("data.length", length, 1),
            ("train.batch", text_lanes, 1),
            ("train.seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if order not in ORDERS:
            raise ValueError(f"data.order is {order}; choose one of {', '.join(ORDERS)}")
        self._reader = SplitReader(path, TRAIN, tolerance)
        self.text_lanes = text_lanes
        self.tokenizer = self._reader.index.tokenizer_sha256
        self._contiguous = order == "contiguous"
        self.order: BestFit | Joined
        if order == "best-fit":
            self.order = BestFit(self._reader, length, seed)
        else:
            lanes = text_lanes if self._contiguous else 1
            self.order = Joined(self._reader, length, lanes, seed, not self._contiguous)
        self.samples_per_epoch = self.order.samples
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"{path} holds {int(self._reader.lengths.sum()):,} training tokens, too few for "
                f"one step of train.batch {text_lanes} x data.length {length} (+ 1 each, "
                f"{text_lanes * (length + 1):,} tokens): lower train.batch or data.length, or "
                "build from more text"
            )
        self._planned: dict[tuple[int, int, int], Parts | None] = {}
        self.fingerprint = hashlib.sha256(self.order.identity.encode()).hexdigest()

    def batch(self, first: int, count: int) -> Batch:
        """Return global samples first to first + count - 1, counted from the start of the run and
        on over the ends of epochs.
        """
        if first < 0 or count < 1:
            raise ValueError(
                f"samples from {first}, {count} of them: the first must be at least 0 and the "
                "count at least 1"
            )
        batches = [
            self.order.batch(epoch, self._plan(epoch, numbers), samples)
            for epoch, numbers, samples in self._by_epoch(first, count)
        ]
        if len(batches) == 1:
            return batches[0]
        return Batch(*(torch.cat(fields) for fields in zip(*batches, strict=True)))

    def predicted(self, first: int, count: int) -> int:
        """Return how many tokens these samples predict, damaged ones included."""
        tokens = 0
        for epoch, numbers, _ in self._by_epoch(first, count):
            planned = self._planned.get((epoch, int(numbers[0]), len(numbers)))
            tokens += (
                self.order.predicted(epoch, numbers)
                if planned is None
                else int(planned.predicted.sum())
            )
        return tokens

    def continues(self, samples: Tensor) -> Tensor:
        """Tell which samples continue the one `text_lanes` before them, the last of their lane; the
        others begin an epoch, and in other orders than contiguous all are others. Bool of the shape
        of `samples`.

        A state carried from step to step belongs to a lane, samples % text_lanes: a row of the
        global batch, whatever the number of ranks. It starts afresh where this is False.
        """
        return (samples % self.samples_per_epoch >= self.text_lanes) & self._contiguous

    def tokens_read(self, step: int) -> int:
        """Return the number of tokens read to predict them in a step, by all ranks."""
        return self.predicted(step * self.text_lanes, self.text_lanes)

    def _plan(self, epoch: int, numbers: np.ndarray) -> Parts:
        """Return the parts of neighbouring sequences of an epoch.

        Where a caller reads the same rows of step after step, those of the next steps are planned
        with them: numpy takes little longer for a thousand rows than for 64.
        """
        first, count = int(numbers[0]), len(numbers)
        key = epoch, first, count
        if (planned := self._planned.get(key)) is not None:
            return planned
        steps = 1
        # None stands for what is expected next.
        if key in self._planned and count <= self.text_lanes:
            left = 1 + (self.samples_per_epoch - first - count) // self.text_lanes
            steps = max(min(left, PLANNED_STEPS, PLANNED_ROWS // count), 1)
        if len(self._planned) * max(count, 64) > MAX_PLANNED:
            self._planned.clear()
        firsts = first + self.text_lanes * np.arange(steps)
        plan = self.order.plan(epoch, (firsts[:, None] + np.arange(count)).ravel())
        if steps > 1:
            for step, begin in enumerate(firsts.tolist()):
                rows = take_range(plan, step * count, (step + 1) * count)
                self._planned[epoch, begin, count] = rows
        self._planned[epoch, first + steps * self.text_lanes, count] = None
        return take_range(plan, 0, count)

    def _by_epoch(self, first: int, count: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Return (epoch, sequences of the epoch, samples) for each epoch with some of the samples,
        int64.
        """
        parts = []
        while count > 0:
            epoch, number = divmod(first, self.samples_per_epoch)
            size = min(count, self.samples_per_epoch - number)
            parts.append((epoch, np.arange(number, number + size), np.arange(first, first + size)))
            first, count = first + size, count - size
        return parts
