"""A batch: rows of input tokens with the token to predict at each position."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that predicts nothing; torch's default ignore_index of cross_entropy. Also
in models/loss.py, since neither package may import the other.
"""


class Batch(NamedTuple):
    """Rows of tokens; all tensors int64.

    inputs [n, length]; targets [n, length], the next token or IGNORE where there is none to
    predict; documents [n, length], place of the document in the stream's order, the same in two
    rows if the second continues it; positions [n, length], 0 to length - 1; samples [n], global
    sample numbers, -1 for filler rows.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor
    positions: Tensor
    samples: Tensor


def make_batch(
    tokens: np.ndarray, documents: np.ndarray, masked: np.ndarray, samples: np.ndarray
) -> Batch:
    """Shift rows of length + 1 tokens, int64 [n, length + 1], into inputs and targets. Masked
    tokens are neither predicted nor predicted from.
    """
    count, length = tokens.shape[0], tokens.shape[1] - 1
    targets = tokens[:, 1:].copy()
    if masked.any():
        targets[masked[:, 1:] | masked[:, :-1]] = IGNORE
    positions = np.empty((count, length), dtype=np.int64)
    positions[:] = np.arange(length)  # a third of the time of torch's repeat
    return Batch(
        # Copies, because inputs and targets of a single row would share memory.
        inputs=torch.from_numpy(tokens[:, :-1].copy()),
        targets=torch.from_numpy(targets),
        documents=torch.from_numpy(documents[:, :-1].copy()),
        positions=torch.from_numpy(positions),
        samples=torch.from_numpy(samples),
    )
