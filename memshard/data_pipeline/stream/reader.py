"""Reading token ranges of a split, straight from the tars; a document's checksum is tested when it
is first read.
"""

import logging
import os
import time
import zlib
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np

from memshard.data_pipeline.fetch import DISK_FULL, Unreachable, is_url
from memshard.data_pipeline.format.index import INDEX_FILE, Index, Shard, load_index
from memshard.data_pipeline.format.remote import BlockCache
from memshard.data_pipeline.format.shards import SIDECAR_COLUMNS, read_sidecar
from memshard.data_pipeline.stream.parts import cut
from memshard.data_pipeline.tokenizer import Tokenizer
from memshard.io import is_absence
from memshard.redact import shown

TOLERANCE = 0.001  # share of a split's tokens that may be damaged
PAUSES = (1.0, 5.0)  # seconds before a read that a disk refused is tried again
# Of raw text in memory, because other rows continue in its documents: those of the sequences that
# are shuffled together (order/permutation.py) in 2 bytes a token, and as much again.
TOKENIZED_BYTES = 1 << 28
_ARRAY_BYTES = 200  # of an array and its place in a dictionary, besides its tokens
log = logging.getLogger(__name__)


class DamagedData(RuntimeError):
    """More of a split is damaged than is tolerated, or all of it is another than at the start."""


class SplitReader:
    """The documents of one split, numbered through its shards.

    A document that cannot be read or fails its checksum is masked: it keeps its length, so that the
    order of all others does not change, but reads as <eos> only. It is logged by name. tolerance:
    share of the split's tokens that may be masked before DamagedData. Where nothing can be read
    now, but perhaps later, Unreachable is raised, and nothing masked.
    """

    def __init__(
        self, path: str | os.PathLike[str], split: str, tolerance: float = TOLERANCE
    ) -> None:
        self.index: Index = load_index(path)
        self._path = str(path)
        shards = self.index.splits[split].shards
        self._files = _ShardFiles(path, shards)
        self._dtype = np.dtype(self.index.dtype).newbyteorder("<")
        sidecars = [read_sidecar(path, shard) for shard in shards]
        entries = (
            np.concatenate(sidecars) if sidecars else np.zeros((0, SIDECAR_COLUMNS), dtype=np.int64)
        )
        self.lengths = np.ascontiguousarray(entries[:, 1])
        self._offsets = np.ascontiguousarray(entries[:, 0])
        self._checksums, self._raw_bytes = entries[:, 2].copy(), entries[:, 3].copy()
        self._eos = np.array(self.index.eos_id, dtype=self._dtype).tobytes()
        self._tokenizer = None if self.index.records.tokenized else Tokenizer(path)
        if self._tokenizer and self._tokenizer.sha256 != self.index.tokenizer_sha256:
            raise ValueError(
                f"{path}/{self.index.tokenizer} is not the tokenizer that the data set was built "
                "with: copy it again, or build the data set again"
            )
        self._tokenized: OrderedDict[int, np.ndarray] = OrderedDict()
        self._tokenized_bytes = 0
        self._shard_of = np.repeat(
            np.arange(len(sidecars), dtype=np.int32), [len(sidecar) for sidecar in sidecars]
        )
        self._first_of = np.concatenate(
            [[0], np.cumsum([len(sidecar) for sidecar in sidecars], dtype=np.int64)]
        )
        self._checked = np.zeros(len(entries), dtype=bool)
        self.damaged = np.zeros(len(entries), dtype=bool)
        self._tolerance = tolerance

    def read(
        self, order: np.ndarray, starts: np.ndarray, begins: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut rows of `count` tokens out of a stream of documents.

        order: int64 [documents], the stream's documents; starts: int64 [documents + 1], where each
        begins in the stream; begins: int64 [n], where each row begins. Returns tokens and the place
        of each one's document in `order`, both int64 [n, count], and which tokens are masked, bool
        [n, count]. Past the stream's end tokens are <eos>.
        """
        parts = cut(starts, begins, count)
        tokens, masked = self.read_parts(
            order[parts.documents], parts.sources, parts.sizes, parts.spans
        )
        return (
            tokens.reshape(-1, count),
            np.repeat(parts.documents, parts.spans).reshape(-1, count),
            masked.reshape(-1, count),
        )

    def read_parts(
        self, documents: np.ndarray, sources: np.ndarray, sizes: np.ndarray, spans: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read parts of documents, each followed by <eos> up to its span.

        Part n, all arrays int64 [n]: `sizes` tokens from number `sources` on of document
        `documents`. Returns tokens, int64 [sum of spans], and which are masked, bool of the same
        shape: the <eos> that follow, and parts of damaged documents.
        """
        for document in documents[~self._checked[documents]].tolist():
            self._check(document)
        tokens = self._together(documents, sources, sizes, spans)
        padding = spans - sizes
        if padding.any():
            masked = np.repeat(
                np.tile([False, True], len(sizes)), np.stack([sizes, padding], axis=1).ravel()
            )
        else:
            masked = np.zeros(spans.sum(), dtype=bool)
        if tokens is None:
            tokens = self._one_by_one(documents, sources, sizes, spans, masked)
        if tokens.max(initial=0) >= self.index.vocab_size:
            raise ValueError(
                f"a shard of {shown(str(self._path))} holds tokens outside the vocabulary: "
                f"find it with `memshard data verify {shown(str(self._path))}` and copy it again"
            )
        return tokens.astype(np.int64), masked

    def _together(
        self, documents: np.ndarray, sources: np.ndarray, sizes: np.ndarray, spans: np.ndarray
    ) -> np.ndarray | None:
        """Return the tokens of `read_parts` in the type of the shards, or None if parts have to be
        read one by one: where one is damaged or cannot be read, and from other sources than files.
        """
        if self._tokenizer is not None or self.damaged[documents].any():
            return None
        width = self._dtype.itemsize
        contents = self._files.read_together(
            self._shard_of[documents].tolist(),
            (self._offsets[documents] + sources * width).tolist(),
            (sizes * width).tolist(),
        )
        if contents is None:
            return None
        padding = spans - sizes
        padded = np.flatnonzero(padding)
        for part, places in zip(padded.tolist(), padding[padded].tolist(), strict=True):
            contents[part] += self._eos * places
        joined = b"".join(contents)
        # Fewer where a file ends early.
        return np.frombuffer(joined, self._dtype) if len(joined) == width * spans.sum() else None

    def _one_by_one(
        self,
        documents: np.ndarray,
        sources: np.ndarray,
        sizes: np.ndarray,
        spans: np.ndarray,
        masked: np.ndarray,
    ) -> np.ndarray:
        """Return the tokens of `read_parts`, and mask those of damaged documents."""
        tokens = np.full(len(masked), self.index.eos_id, dtype=np.int64)
        for document, shard, offset, at, to, size in zip(
            documents.tolist(),
            self._shard_of[documents].tolist(),
            self._offsets[documents].tolist(),
            sources.tolist(),
            (np.cumsum(spans) - spans).tolist(),
            sizes.tolist(),
            strict=True,
        ):
            # Not looked up for all: an earlier part may have found the damage.
            damaged = self.damaged[document]
            part = None if damaged else self._token_range(document, shard, offset, at, size)
            if part is None:
                masked[to : to + size] = True
            else:
                tokens[to : to + size] = part
        return tokens

    def _check(self, document: int) -> None:
        """Test a document's checksum, once."""
        # Raw text is read whole every time, and tested there.
        if self._checked[document] or self._tokenizer is not None:
            return
        self._whole(document, int(self.lengths[document]) * self._dtype.itemsize)
        self._checked[document] = True  # last: what could not be fetched is not checked

    def _token_range(
        self, document: int, shard: int, offset: int, begin: int, size: int
    ) -> np.ndarray | None:
        """Return tokens begin to begin + size - 1 of the document at `offset` of a shard, or None
        if they are damaged.
        """
        if self._tokenizer is not None:
            tokens = self._tokens(document, self._tokenizer)
            return None if tokens is None else tokens[begin : begin + size]
        width = self._dtype.itemsize
        content = self._bytes(document, shard, offset + begin * width, size * width)
        return None if content is None else np.frombuffer(content, dtype=self._dtype)

    def _tokens(self, document: int, tokenizer: Tokenizer) -> np.ndarray | None:
        """Return all tokens of a document of raw text, or None if it is damaged."""
        if document not in self._tokenized:
            content = self._whole(document, int(self._raw_bytes[document]))
            if content is None:
                return None
            text = content.decode("utf-8-sig")
            tokens = np.array([*tokenizer.encode(text), self.index.eos_id], dtype=self._dtype)
            if len(tokens) != self.lengths[document]:
                raise ValueError(
                    f"{shown(str(self._path))} was indexed with another tokenizer: build the index "
                    "again"
                )
            self._tokenized[document] = tokens
            self._tokenized_bytes += tokens.nbytes + _ARRAY_BYTES
            while self._tokenized_bytes > TOKENIZED_BYTES and len(self._tokenized) > 1:
                _, oldest = self._tokenized.popitem(last=False)
                self._tokenized_bytes -= oldest.nbytes + _ARRAY_BYTES
        return self._tokenized[document]

    def _whole(self, document: int, size: int) -> bytes | None:
        """Return a document's bytes, all `size`; mask it and return None if they cannot be read or
        fail their checksum.
        """
        shard, offset = int(self._shard_of[document]), int(self._offsets[document])
        content = self._bytes(document, shard, offset, size)
        if content is None or zlib.crc32(content) == self._checksums[document]:
            return content
        # What a cache holds may have been damaged there: only what comes from the source counts.
        if self._files.drop_cached(shard, offset, size):
            content = self._bytes(document, shard, offset, size)
            if content is None or zlib.crc32(content) == self._checksums[document]:
                return content
        self._mask(document, "its content differs from its checksum")
        return None

    def _bytes(self, document: int, shard: int, begin: int, size: int) -> bytes | None:
        """Return bytes begin to begin + size - 1 of a shard, which are of a document; mask it and
        return None if they cannot be read.
        """
        try:
            content = self._files.read(shard, begin, size)
            if len(content) == size:
                return content
            self._mask(document, f"the file ends {size - len(content)} bytes early")
        except OSError as error:
            if error.errno in DISK_FULL or isinstance(error, Unreachable):
                raise  # a cache without room says nothing about the document, nor does a network
            self._mask(document, str(error))
        return None

    def _mask(self, document: int, reason: str) -> None:
        """Mask a document; DamagedData if too many tokens are."""
        shard = int(self._shard_of[document])
        self.damaged[document] = True
        name = f"{self._files.shards[shard].file}, document {document - self._first_of[shard]}"
        log.warning(
            "%s of %s is masked, %d tokens: %s", name, self._path, self.lengths[document], reason
        )
        tokens, allowed = (
            int(self.lengths[self.damaged].sum()),
            self._tolerance * int(self.lengths.sum()),
        )
        if tokens > allowed:
            if self._built_anew():
                raise DamagedData(
                    f"{self._path} has been built anew since this process opened it: a run needs "
                    "the data that it began with"
                )
            raise DamagedData(
                f"{shown(str(self._path))}: {tokens:,} tokens of {int(self.damaged.sum())} "
                f"documents are damaged, more than the {allowed:,.0f} "
                f"that are tolerated, the last one {name} ({reason}): find all with `memshard "
                f"data verify {shown(str(self._path))}`, copy them again"
            )

    def _built_anew(self) -> bool:
        """Return whether the folder holds another data set now, which is sound by itself."""
        try:
            return load_index(self._path).fingerprint != self.index.fingerprint
        except (OSError, ValueError):
            return False


class _ShardFiles:
    """Byte ranges of shards, which are opened when first read: a rank needs only some of them."""

    def __init__(self, path: str | os.PathLike[str], shards: tuple[Shard, ...]) -> None:
        self.shards = shards
        self._folder = Path(path)
        self._remote = BlockCache(str(path)) if is_url(path) else None
        self._open: dict[int, int] = {}

    def read(self, shard: int, begin: int, size: int) -> bytes:
        facts = self.shards[shard]
        if self._remote is not None:
            return self._remote.read(facts.file, facts.sha256, facts.bytes, begin, begin + size)
        path = self._folder / facts.file
        for pause in PAUSES:
            try:
                return self._read_file(shard, begin, size)
            except OSError as error:
                if is_absence(error) and self._is_damage(error, path):
                    raise
                # A mount that comes back; masked, a sound document would be lost to the run.
                log.warning("%s: %s; it is tried again", path, error)
                time.sleep(pause)
        try:
            return self._read_file(shard, begin, size)
        except OSError as error:
            if self._is_damage(error, path):
                raise
            tries = len(PAUSES) + 1
            raise Unreachable(f"{path}: {error.strerror}, tried {tries} times") from error

    def _is_damage(self, error: OSError, path: Path) -> bool:
        """Tell whether a read failed at this place alone, and not for a disk that is away."""
        with suppress(OSError):
            if is_absence(error):
                return (self._folder / INDEX_FILE).exists()
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if hasattr(os, "posix_fadvise"):
                    # Else the system answers from memory, also for a disk that is gone.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return any(_answers(file.fileno(), place) for place in (0, size // 2, size - 1))
        return False

    def read_together(
        self, shards: list[int], begins: list[int], sizes: list[int]
    ) -> list[bytes] | None:
        """Return many byte ranges of files, or None where `read` has to try again or to fetch."""
        if self._remote is not None:
            return None
        try:
            for shard in set(shards).difference(self._open):
                self._open_file(shard)
            # Rows of 64 tokens are read in 1 us each, and a call of our own would take 0.1.
            files, pread = self._open, os.pread
            return [
                pread(files[shard], size, begin)
                for shard, begin, size in zip(shards, begins, sizes, strict=True)
            ]
        except OSError:
            return None

    def _read_file(self, shard: int, begin: int, size: int) -> bytes:
        if shard not in self._open:
            self._open_file(shard)
        try:
            # pread has no file position, so threads can share the descriptor.
            return os.pread(self._open[shard], size, begin)
        except OSError:
            os.close(self._open.pop(shard))  # a stale handle stays stale
            raise

    def _open_file(self, shard: int) -> None:
        self._open[shard] = os.open(self._folder / self.shards[shard].file, os.O_RDONLY)

    def drop_cached(self, shard: int, begin: int, size: int) -> bool:
        """Forget these bytes if they came from a cache, and return whether they did."""
        if self._remote is None:
            return False
        facts = self.shards[shard]
        self._remote.drop(facts.file, facts.sha256, facts.bytes, begin, begin + size)
        return True

    def __getstate__(self) -> dict:
        """Leave out open files: each worker process opens its own."""
        return {**vars(self), "_open": {}}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _answers(descriptor: int, place: int) -> bool:
    try:
        os.pread(descriptor, 1, place)
    except OSError:
        return False
    return True
