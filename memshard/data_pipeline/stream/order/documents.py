"""The order of an epoch's documents: a pure function of (seed, epoch, number of documents, lanes).

Blocks of neighbouring documents are permuted, then documents are shuffled inside windows of some
blocks. Streams of joined documents cut the tokens in this order into equal lanes: whatever the
documents' sizes, every epoch has the same number of samples, and loses less than one a lane.
"""

import numpy as np

# Documents that stay neighbours until the window shuffle: reads of a large corpus are local.
MAX_BLOCK = 64
WINDOW = 16  # blocks shuffled together
# Wanted; a small corpus gets blocks of one document, which makes the order a full permutation.
BLOCKS_PER_LANE = 100


def epoch_order(
    documents: int, lanes: int, seed: int, epoch: int, max_block: int = MAX_BLOCK
) -> np.ndarray:
    """Return document numbers in reading order, int64 [documents], each once. max_block: of
    documents that stay neighbours until the window shuffle.

    Only raw Philox output is used, which numpy promises never to change; it does not promise that
    of its shuffles.
    """
    block = int(np.clip(documents // (BLOCKS_PER_LANE * lanes), 1, max_block))
    random = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    blocks = np.argsort(random.random_raw(-(-documents // block)), kind="stable")
    order: np.ndarray = (blocks[:, None] * block + np.arange(block)).ravel()
    order = order[order < documents]  # the last block may be short

    window = block * WINDOW
    windows = -(-documents // window)
    padding = windows * window - documents
    keys = random.random_raw(windows * window)
    # Padding sorts last in the last window, where the final slice drops it.
    keys[documents:] = np.iinfo(np.uint64).max
    order = np.concatenate([order, np.full(padding, -1)]).reshape(windows, window)
    order = np.take_along_axis(
        order, np.argsort(keys.reshape(windows, window), axis=1, kind="stable"), axis=1
    ).ravel()
    return order[:documents]
