"""The held-out stream: documents in order, every token after the first predicted exactly once."""

import os

import numpy as np

from memshard.data_pipeline.format.index import HELD_OUT
from memshard.data_pipeline.stream.batch import IGNORE, Batch, make_batch
from memshard.data_pipeline.stream.reader import SplitReader


class HeldOutStream:
    """Windows of `length` tokens over the held-out documents of a data folder, at most `max_tokens`
    predicted tokens.

    stride: tokens from one window to the next, by default length. With a smaller one windows
    overlap: the first `overlap` tokens of every later window are only context, since the window
    before predicts them. windows: their number; the last one is padded. tokens: predicted over all
    windows. text_bytes and words: of the held-out text that these tokens cover, for bits per byte
    and perplexity per word; None if max_tokens cuts the text, since a cut may be inside a word.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        length: int,
        max_tokens: int | None = None,
        stride: int | None = None,
    ) -> None:
        if length < 1:
            raise ValueError(f"data.length is {length}; it must be at least 1")
        if stride is not None and not 1 <= stride <= length:
            raise ValueError(
                f"the stride of held-out windows is {stride}; use 1 to {length}, the length of a "
                "window"
            )
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(
                f"held-out tokens are limited to {max_tokens}; the limit must be at least 1 "
                "(train.eval_tokens)"
            )
        self._reader = SplitReader(path, HELD_OUT)
        self._length, self._stride = length, stride or length
        self.overlap = length - self._stride
        split = self._reader.index.splits[HELD_OUT]
        if split.tokens < 2:
            raise ValueError(
                f"{path} has no held-out text: build the data set again with a larger --held-out"
            )
        self.tokens = split.tokens - 1 if max_tokens is None else min(split.tokens - 1, max_tokens)
        # The first window predicts `length` tokens, every later one `stride` more.
        self.windows = 1 + -(-max(self.tokens - length, 0) // self._stride)
        whole = self.tokens == split.tokens - 1
        self.text_bytes: int | None = split.text_bytes if whole else None
        self.words: int | None = split.words if whole else None
        self._order = np.arange(len(self._reader.lengths))
        self._starts = np.concatenate([[0], np.cumsum(self._reader.lengths)])

    def batch(self, first: int, count: int) -> Batch:
        """Return windows first to first + count - 1; those past the end are filler rows (targets
        IGNORE, samples -1).
        """
        windows = first + np.arange(count)
        # Windows past the end start at the last token, to have the right shape.
        begins = np.minimum(windows * self._stride, self._starts[-1] - 1)
        tokens, documents, masked = self._reader.read(
            self._order, self._starts, begins, self._length + 1
        )
        batch = make_batch(tokens, documents, masked, np.where(windows < self.windows, windows, -1))
        predicted = windows[:, None] * self._stride + np.arange(self._length)
        batch.targets.numpy()[(predicted >= self.tokens) | (windows >= self.windows)[:, None]] = (
            IGNORE
        )
        return batch
