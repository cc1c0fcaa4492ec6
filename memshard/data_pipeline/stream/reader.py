"""Reading token ranges of a split by index, straight from the memory-mapped tars."""

import os
from pathlib import Path

import numpy as np

from memshard.data_pipeline.format.index import Index, load_index
from memshard.data_pipeline.format.shards import SIDECAR_COLUMNS, read_sidecar


class SplitReader:
    """The documents of one split, numbered over its shards in order."""

    def __init__(self, path: str | os.PathLike[str], split: str) -> None:
        self.folder = Path(path)
        self.index: Index = load_index(self.folder)
        self._shards = self.index.splits[split].shards
        self._dtype = np.dtype(self.index.dtype).newbyteorder("<")
        sidecars = [read_sidecar(self.folder, shard) for shard in self._shards]
        entries = np.concatenate(sidecars) if sidecars else np.zeros((0, SIDECAR_COLUMNS), dtype=np.int64)
        self.lengths = np.ascontiguousarray(entries[:, 1])
        self._offsets = entries[:, 0] // self._dtype.itemsize
        self._shard_of = np.repeat(np.arange(len(sidecars), dtype=np.int32), [len(sidecar) for sidecar in sidecars])
        self._maps: dict[int, np.memmap] = {}

    def read(self, order: np.ndarray, starts: np.ndarray, begins: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut rows of `count` tokens out of a stream of documents.

        order: int64 [documents], the stream's documents; starts: int64 [documents + 1], where each begins in the stream;
        begins: int64 [n], where each row begins. Returns tokens and document numbers within the row (from 0), both
        int64 [n, count]; past the stream's end tokens are <eos>.
        """
        ends = np.minimum(begins + count, starts[-1])
        first = np.searchsorted(starts, begins, side="right") - 1
        pieces = np.searchsorted(starts, ends, side="left") - first  # documents that a row touches
        rows = np.repeat(np.arange(len(begins)), pieces)
        number = np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        slots = first[rows] + number
        piece_begin = np.maximum(starts[slots], begins[rows])
        piece_end = np.minimum(starts[slots + 1], ends[rows])
        source = self._offsets[order[slots]] + piece_begin - starts[slots]
        target = rows * count + piece_begin - begins[rows]

        tokens = np.full(len(begins) * count, self.index.eos_id, dtype=np.int64)
        shards = self._shard_of[order[slots]].tolist()
        for shard, at, to, size in zip(shards, source.tolist(), target.tolist(), (piece_end - piece_begin).tolist(), strict=True):
            tokens[to : to + size] = self._map(shard)[at : at + size]
        if tokens.max(initial=0) >= self.index.vocab_size:
            raise ValueError(
                f"a shard of {self.folder} holds tokens outside the vocabulary: "
                f"find it with `memshard data verify {self.folder}` and copy it again"
            )
        documents = np.zeros_like(tokens)
        documents[target[number > 0]] = 1
        return tokens.reshape(-1, count), documents.reshape(-1, count).cumsum(axis=1)

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:  # opened when first read: a rank needs only the shards of its lanes
            self._maps[shard] = np.memmap(self.folder / self._shards[shard].file, dtype=self._dtype, mode="r")
        return self._maps[shard]
