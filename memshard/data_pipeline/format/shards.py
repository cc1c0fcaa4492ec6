"""Token shards: standard WebDataset tars with several documents a sample, each with a sidecar file
that says where each document is.
"""

import io
import math
import os
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np

from memshard.data_pipeline.fetch import is_url
from memshard.data_pipeline.format.index import Shard, sha256_file
from memshard.data_pipeline.format.remote import local_copy
from memshard.io import atomic_write, partial_path, read_small, sync

DOCUMENTS_PER_SAMPLE = 64  # tar headers and padding cost 2.5 %; 12 % with one document a sample
SIDECAR_COLUMNS = 4
_MOST_HEADER = 1 << 16
_HEADER = re.compile(
    rb"\{'descr': '([^']*)', 'fortran_order': False, 'shape': \(([\d, ]*)\), \}\s*"
)


class ShardWriter:
    """Write one shard, documents in the order they are added; the same documents give the same
    bytes.

    A sample holds `{key}.tokens.npy`, the tokens of its documents one after the other, and
    `{key}.lengths.npy`, uint32 tokens per document. Files appear under their names when they are
    whole.
    """

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._path = folder / f"{name}.tar"
        self._sidecar_path = folder / f"{name}.index.npy"
        self._name = name
        self._dtype = np.dtype(dtype)
        self._partial = partial_path(self._path)
        self._file = self._partial.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._sample: list[np.ndarray] = []
        self._sidecar: list[np.ndarray] = []
        self._samples = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
            self._partial.unlink(missing_ok=True)  # of a shard that failed; a disk may be full

    def add(self, tokens: np.ndarray) -> None:
        """Add a document: its tokens [n] with the closing <eos>."""
        self._sample.append(tokens.astype(self._dtype, copy=False))
        if len(self._sample) == DOCUMENTS_PER_SAMPLE:
            self._write_sample()

    def finish(self) -> Shard:
        """Close the files and return what was written."""
        self._write_sample()
        self._tar.close()
        self._file.flush()
        sync(self._file.fileno())
        self._file.close()
        entries = (
            np.concatenate(self._sidecar) if self._sidecar else np.zeros((0, 3), dtype=np.int64)
        )
        # The sidecar first: a tar under its name is then never without one.
        with atomic_write(self._sidecar_path, durable=True) as file, file.open("wb") as stream:
            np.save(stream, entries)
        self._partial.replace(self._path)
        return Shard(
            file=self._path.name,
            documents=len(entries),
            tokens=int(entries[:, 1].sum()),
            bytes=self._path.stat().st_size,
            sha256=sha256_file(self._path),
            sidecar=self._sidecar_path.name,
            sidecar_sha256=sha256_file(self._sidecar_path),
        )

    def _write_sample(self) -> None:
        if not self._sample:
            return
        lengths = np.array([len(document) for document in self._sample], dtype=np.uint32)
        start = self._write_member("tokens", np.concatenate(self._sample))
        self._write_member("lengths", lengths)
        offsets = (
            start
            + np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * self._dtype.itemsize
        )
        checksums = np.array([zlib.crc32(document.tobytes()) for document in self._sample])
        self._sidecar.append(np.stack([offsets, lengths, checksums], axis=1).astype(np.int64))
        self._samples += 1
        self._sample = []

    def _write_member(self, name: str, array: np.ndarray) -> int:
        """Write an array and return the byte offset of its first element in the tar."""
        content = io.BytesIO()
        np.lib.format.write_array(
            content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False
        )
        member = tarfile.TarInfo(f"{self._name}-{self._samples:06d}.{name}.npy")
        # mtime, uid and gid stay 0, so that nothing of the machine gets in.
        member.size = content.tell()
        member.mode = 0o644
        content.seek(0)
        # A member is a 512-byte header and its content; the array is the end of the .npy.
        data_start = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(member, content)
        return data_start + member.size - array.nbytes


def read_sidecar(folder: str | os.PathLike[str], shard: Shard) -> np.ndarray:
    """Return the sidecar of a shard, int64 [documents, 4] of (byte offset in the tar, tokens,
    CRC-32 of the bytes, bytes). ValueError if it is not the one that the index names.

    Only sidecars of raw text have the last column; the bytes of tokens follow from their number and
    are 0 here.
    """
    path = local_copy(folder, shard.sidecar, shard.sidecar_sha256 if is_url(folder) else None)
    # At each start: a flipped bit in an offset or a checksum would mask a sound document. 24 bytes
    # a document, so those of 40 million take a second.
    if sha256_file(path) != shard.sidecar_sha256:
        raise ValueError(
            f"{path} is damaged (its content differs from its hash): copy it again, or build the "
            "data set again"
        )
    try:
        most = _MOST_HEADER + shard.documents * SIDECAR_COLUMNS * np.dtype(np.int64).itemsize
        entries = read_npy(read_small(path, most), np.dtype(np.int64))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): copy it again, or build the data set again"
        ) from error
    if entries.shape == (shard.documents, SIDECAR_COLUMNS - 1):
        entries = np.pad(entries, ((0, 0), (0, 1)))
    if entries.shape != (shard.documents, SIDECAR_COLUMNS) or entries[:, 1].sum() != shard.tokens:
        raise ValueError(
            f"{path} does not list {shard.documents:,} documents with {shard.tokens:,} tokens: "
            "build the data set again"
        )
    if (
        entries[:, [0, 1, 3]].min(initial=0) < 0
        or entries[:, [0, 1, 3]].max(initial=0) > shard.bytes
    ):
        raise ValueError(f"{path} points outside {shard.file}: build the data set again")
    return entries


def read_npy(content: bytes, dtype: np.dtype) -> np.ndarray:
    """Return the array of a .npy file, as numpy writes those in C order; it cannot be written to.
    ValueError if it has another dtype, or its header another size than the file.

    Not numpy's reader, which parses headers as Python: hostile ones raise errors of a dozen types,
    and what they promise is allocated before it is read.
    """
    end = 10 + int.from_bytes(content[8:10], "little")
    header = _HEADER.fullmatch(content, 10, end)
    if not content.startswith(b"\x93NUMPY\x01\x00") or header is None:
        raise ValueError("it is no array")
    shape = tuple(int(size) for size in header[2].split(b",") if size.strip())
    if header[1].decode("latin-1") != dtype.str:
        raise ValueError(f"it is no array of {dtype}")
    if math.prod(shape) * dtype.itemsize != len(content) - end:
        raise ValueError(f"it holds {len(content) - end} bytes, and its header says {shape}")
    return np.frombuffer(content, dtype, offset=end).reshape(shape)
