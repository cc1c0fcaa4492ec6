"""The order of an epoch: a pure function of (seed, epoch, number of documents, lanes).

Blocks of neighbouring documents are permuted, then documents are shuffled inside windows of some
blocks. The result is one token stream per epoch, cut into equal lanes: whatever the documents'
sizes, lanes hold the same number of tokens, so every epoch has the same number of samples and an
epoch loses less than one sample a lane.
"""

import numpy as np

MAX_BLOCK = (
    64  # documents that stay neighbours until the window shuffle: reads stay local in large corpora
)
WINDOW = 16  # blocks shuffled together
# At least, where the corpus allows: small corpora get blocks of one document, a full permutation.
BLOCKS_PER_LANE = 100


def epoch_order(documents: int, lanes: int, seed: int, epoch: int) -> np.ndarray:
    """Document numbers in reading order, int64 [documents], each once.

    Only raw Philox output is used, which numpy promises never to change; its higher-level shuffles
    carry no such promise.
    """
    block = int(np.clip(documents // (BLOCKS_PER_LANE * lanes), 1, MAX_BLOCK))
    random = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    blocks = np.argsort(random.random_raw(-(-documents // block)), kind="stable")
    order: np.ndarray = (blocks[:, None] * block + np.arange(block)).ravel()
    order = order[order < documents]  # the last block may be short

    window = block * WINDOW
    windows = -(-documents // window)
    padding = windows * window - documents
    keys = random.random_raw(windows * window)
    keys[documents:] = np.iinfo(np.uint64).max
    order = np.concatenate([order, np.full(padding, -1)]).reshape(windows, window)
    order = np.take_along_axis(
        order, np.argsort(keys.reshape(windows, window), axis=1, kind="stable"), axis=1
    ).ravel()
    return order[:documents]
