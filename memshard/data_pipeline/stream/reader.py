"""Reading token ranges of a split by index, straight from the tars, with a checksum of every document when it is first read."""

import logging
import os
import zlib
from pathlib import Path

import numpy as np

from memshard.data_pipeline.format.index import Index, Shard, load_index
from memshard.data_pipeline.format.remote import BlockCache
from memshard.data_pipeline.format.shards import SIDECAR_COLUMNS, read_sidecar
from memshard.data_pipeline.sources.fetch import is_url

TOLERANCE = 0.001
log = logging.getLogger(__name__)


class SplitReader:
    """The documents of one split, numbered over its shards in order.

    A document that cannot be read or fails its checksum is masked: it keeps its length, so that the order stays, but holds <eos>
    only. It is logged by name. tolerance: share of the split's tokens that may be masked before RuntimeError.
    """

    def __init__(self, path: str | os.PathLike[str], split: str, tolerance: float = TOLERANCE) -> None:
        self.index: Index = load_index(path)
        self._path = str(path)
        shards = self.index.splits[split].shards
        self._files = _ShardFiles(self._path, shards)
        self._dtype = np.dtype(self.index.dtype).newbyteorder("<")
        sidecars = [read_sidecar(path, shard) for shard in shards]
        entries = np.concatenate(sidecars) if sidecars else np.zeros((0, SIDECAR_COLUMNS), dtype=np.int64)
        self.lengths = np.ascontiguousarray(entries[:, 1])
        self._offsets = np.ascontiguousarray(entries[:, 0])
        self._checksums = entries[:, 2].copy()
        self._shard_of = np.repeat(np.arange(len(sidecars), dtype=np.int32), [len(sidecar) for sidecar in sidecars])
        self._first_of = np.concatenate([[0], np.cumsum([len(sidecar) for sidecar in sidecars], dtype=np.int64)])
        self._checked = np.zeros(len(entries), dtype=bool)
        self.damaged = np.zeros(len(entries), dtype=bool)
        self._tolerance = tolerance

    def read(
        self, order: np.ndarray, starts: np.ndarray, begins: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut rows of `count` tokens out of a stream of documents.

        order: int64 [documents], the stream's documents; starts: int64 [documents + 1], where each begins in the stream;
        begins: int64 [n], where each row begins. Returns tokens and document numbers within the row (from 0), both
        int64 [n, count], and bool [n, count], where tokens are masked; past the stream's end tokens are <eos>.
        """
        ends = np.minimum(begins + count, starts[-1])
        first = np.searchsorted(starts, begins, side="right") - 1
        pieces = np.searchsorted(starts, ends, side="left") - first  # documents that a row touches
        rows = np.repeat(np.arange(len(begins)), pieces)
        number = np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        slots = first[rows] + number
        piece_begin = np.maximum(starts[slots], begins[rows])
        sizes = np.minimum(starts[slots + 1], ends[rows]) - piece_begin
        target = rows * count + piece_begin - begins[rows]
        chosen = order[slots]
        for document in chosen[~self._checked[chosen]].tolist():
            self._check(document)

        source = self._offsets[chosen] + (piece_begin - starts[slots]) * self._dtype.itemsize
        tokens = np.full(len(begins) * count, self.index.eos_id, dtype=np.int64)
        masked = np.zeros(len(tokens), dtype=bool)
        for document, shard, at, to, size in zip(
            chosen.tolist(), self._shard_of[chosen].tolist(), source.tolist(), target.tolist(), sizes.tolist(), strict=True
        ):
            content = b"" if self.damaged[document] else self._content(document, shard, at, size)
            if content:
                tokens[to : to + size] = np.frombuffer(content, dtype=self._dtype)
            else:
                masked[to : to + size] = True
        if tokens.max(initial=0) >= self.index.vocab_size:
            raise ValueError(
                f"a shard of {self._path} holds tokens outside the vocabulary: "
                f"find it with `memshard data verify {self._path}` and copy it again"
            )
        documents = np.zeros_like(tokens)
        documents[target[number > 0]] = 1
        return tokens.reshape(-1, count), documents.reshape(-1, count).cumsum(axis=1), masked.reshape(-1, count)

    def _check(self, document: int) -> None:
        """Read a document for the first time."""
        if self._checked[document]:
            return
        self._checked[document] = True
        if self._checksums[document] >= 0:
            size = int(self.lengths[document]) * self._dtype.itemsize
            content = self._content(document, int(self._shard_of[document]), int(self._offsets[document]), size // self._dtype.itemsize)
            if content and zlib.crc32(content) != self._checksums[document]:
                self._mask(document, "its content differs from its checksum")

    def _content(self, document: int, shard: int, at: int, tokens: int) -> bytes:
        """Bytes of a document, or none if they cannot be read."""
        size = tokens * self._dtype.itemsize
        try:
            content = self._files.read(shard, at, size)
            if len(content) == size:
                return content
            self._mask(document, f"the file ends {size - len(content)} bytes early")
        except OSError as error:
            self._mask(document, str(error))
        return b""

    def _mask(self, document: int, reason: str) -> None:
        shard = int(self._shard_of[document])
        self.damaged[document] = True
        name = f"{self._files.shards[shard].file}, document {document - self._first_of[shard]}"
        log.warning("%s of %s is masked, %d tokens: %s", name, self._path, self.lengths[document], reason)
        tokens, allowed = int(self.lengths[self.damaged].sum()), self._tolerance * int(self.lengths.sum())
        if tokens > allowed:
            raise RuntimeError(
                f"{self._path}: {tokens:,} tokens of {int(self.damaged.sum())} documents are damaged, more than the {allowed:,.0f} "
                f"that are tolerated, the last one {name} ({reason}): find all with `memshard data verify {self._path}`, copy them again"
            )


class _ShardFiles:
    """Byte ranges of shards, opened when first read: a rank needs only the shards of its lanes."""

    def __init__(self, path: str, shards: tuple[Shard, ...]) -> None:
        self.shards = shards
        self._folder = Path(path)
        self._remote = BlockCache(path) if is_url(path) else None
        self._open: dict[int, int] = {}

    def read(self, shard: int, begin: int, size: int) -> bytes:
        if self._remote is not None:
            return self._remote.read(self.shards[shard].file, self.shards[shard].bytes, begin, begin + size)
        if shard not in self._open:
            self._open[shard] = os.open(self._folder / self.shards[shard].file, os.O_RDONLY)
        return os.pread(self._open[shard], size, begin)

    def __getstate__(self) -> dict:
        """For worker processes: each opens its own."""
        return {**vars(self), "_open": {}}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
