"""The bytes of a text as tokens: a part to train on, and two held-out parts."""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 0.05
"""Share of the text for each of the two held-out parts."""


@dataclass(frozen=True)
class Text:
    """A text as tokens, which number the byte values that occur. train, valid, test: uint8 [n]."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocabulary: int
    digest: str

    def batch(self, seed: int, step: int, batch: int, length: int) -> Tensor:
        """Return windows of the training part, int64 [batch, length + 1], a function of the
        arguments only.
        """
        starts = np.random.default_rng([seed, step]).integers(
            0, len(self.train) - length, size=batch
        )
        return torch.from_numpy(
            self.train[starts[:, None] + np.arange(length + 1)].astype(np.int64)
        )

    def held_out(self, part: str, tokens: int, length: int) -> Tensor:
        """Return evenly spaced windows of a held-out part that predict about `tokens` tokens, int64
        [n, length + 1].
        """
        data: np.ndarray = getattr(self, part)
        count = max(1, min(tokens, len(data) - 1) // length)
        starts = np.linspace(0, len(data) - length - 1, count).astype(np.int64)
        return torch.from_numpy(data[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def read_text(path: str, length: int) -> Text:
    """Return the text of a file, plain or .gz. ValueError if its held-out parts are shorter than a
    sequence of `length`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no text {path}: give text=FILE")
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    cut = int(len(data) * HELD_OUT)
    if cut <= length + 1:
        raise ValueError(
            f"{path}: {len(data):,} bytes are too few; sequences of {length} need "
            f"{int((length + 2) / HELD_OUT):,}"
        )
    values, tokens = np.unique(np.frombuffer(data, dtype=np.uint8), return_inverse=True)
    tokens = tokens.astype(np.uint8)
    # The search sees `valid` only; `test` is for the verdict, which must not be chosen by.
    train, valid, test = tokens[: -2 * cut], tokens[-2 * cut : -cut], tokens[-cut:]
    return Text(train, valid, test, len(values), hashlib.sha256(data).hexdigest())
