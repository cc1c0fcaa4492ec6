"""Check a data folder, here or at a URL: every file against its hash, every count against the
content.
"""

import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from memshard.data_pipeline.fetch import fetch, is_url
from memshard.data_pipeline.format.index import (
    INDEX_FILE,
    REPORT_FILE,
    Index,
    Shard,
    load_index,
    read_index,
    sha256_file,
)
from memshard.data_pipeline.format.remote import file_url
from memshard.data_pipeline.format.shards import read_npy, read_sidecar


def verify_data(path: str | os.PathLike[str]) -> dict:
    """Re-hash everything, compare counts, and return totals. ValueError names every bad file.

    path: a folder or a URL, whose files are fetched anew, past the cache, a shard at a time.
    """
    folder, remote = Path(path), is_url(path)
    # `load_index` refuses a folder without an index in words that say what to do, but also one
    # that lacks a file, and verification names all such files.
    here = not remote and (folder / INDEX_FILE).is_file()
    index = read_index(folder) if here else load_index(path)
    shards = [shard for split in index.splits.values() for shard in split.shards]
    problems = []
    hashes = {index.tokenizer: index.tokenizer_sha256, REPORT_FILE: index.report_sha256}
    for name, sha256 in hashes.items():
        if sha256:  # images have no tokenizer
            with _files(path, name) as (copied, missing):
                problems += missing or _file_problems(copied / name, None, sha256)
    for shard in tqdm(shards, "verifying", unit="shard", disable=None, leave=False):
        with _files(path, shard.sidecar, shard.file) as (copied, missing):
            problems += missing or _problems(copied, index, shard)
    if problems:
        raise ValueError(
            f"{path} is damaged: {'; '.join(problems)}. Copy these files again, or build the "
            "data set again"
        )
    return {
        "data": str(path),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
    } | {
        name: {"documents": split.documents, "tokens": split.tokens}
        for name, split in index.splits.items()
    }


@contextmanager
def _files(path: str | os.PathLike[str], *names: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder that holds these files of a data folder, and what is wrong with those that
    could not be fetched. A context manager, at whose end copies are removed.
    """
    if not is_url(path):
        yield Path(path), []
        return
    with tempfile.TemporaryDirectory() as scratch:
        missing = []
        for name in names:
            try:
                fetch(file_url(str(path), name), Path(scratch)).rename(Path(scratch, name))
            except OSError as error:
                missing.append(f"{name}: {error}")
        yield Path(scratch), missing


def _file_problems(file: Path, size: int | None, sha256: str) -> list[str]:
    if not file.is_file():
        return [f"{file.name}: is missing"]
    there = file.stat().st_size
    if size is not None and there != size:
        return [
            f"{file.name}: has {there:,} bytes instead of {size:,}"
            if there
            else f"{file.name}: is empty"
        ]
    return [] if sha256_file(file) == sha256 else [f"{file.name}: content differs from its hash"]


def _problems(folder: Path, index: Index, shard: Shard) -> list[str]:
    sidecar = _file_problems(folder / shard.sidecar, None, shard.sidecar_sha256)
    tar = _file_problems(folder / shard.file, shard.bytes, shard.sha256)
    # A sound sidecar says which documents of a damaged tar are lost.
    if tar and not sidecar and tar[0].endswith("hash"):
        tar = [f"{tar[0]} ({_bad_documents(folder, index, shard) or 'no document of it'})"]
    if tar or sidecar:
        return tar + sidecar
    if not index.records.tokenized:
        bad = _bad_documents(folder, index, shard)
        return (
            [f"{shard.sidecar}: does not list the documents of {shard.file} ({bad})"] if bad else []
        )
    entries = read_sidecar(folder, shard)
    try:
        documents, largest = _documents(folder / shard.file, np.dtype(index.dtype))
    except (ValueError, tarfile.TarError) as error:
        return [f"{shard.file}: is no shard of tokens ({error})"]
    # Files may match their hashes and still disagree, if the builder was interrupted or wrong.
    if not np.array_equal(documents, entries[:, :2]) or _bad_documents(folder, index, shard):
        return [f"{shard.sidecar}: does not list the documents of {shard.file}"]
    return (
        [f"{shard.file}: token {largest} is outside the vocabulary"]
        if largest >= index.vocab_size
        else []
    )


def _documents(shard: Path, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """Return where each document of a shard begins and how many tokens it has, int64 [documents,
    2], and the largest token. TarError or ValueError if it is no tar of such arrays.
    """
    documents, largest = [np.zeros((0, 2), dtype=np.int64)], 0
    # "r:", or a compressed tar, which may be of any size, would be decompressed.
    with tarfile.open(shard, "r:") as archive:
        members = list(archive)
        if len(members) % 2:
            raise ValueError(f"{members[-1].name} has no lengths")
        for tokens, lengths in zip(members[::2], members[1::2], strict=True):
            ids, counts = (
                _array(archive, member, kind)
                for member, kind in ((tokens, dtype), (lengths, np.dtype(np.uint32)))
            )
            begins = (
                # The .npy header is shorter than the member, so the array starts at its end minus
                # its bytes.
                tokens.offset_data
                + tokens.size
                - ids.nbytes
                + (np.cumsum(counts, dtype=np.int64) - counts) * ids.itemsize
            )
            documents.append(np.stack([begins, counts], axis=1))
            largest = max(largest, int(ids.max(initial=0)))
    return np.concatenate(documents), largest


def _bad_documents(folder: Path, index: Index, shard: Shard) -> str:
    """Return the numbers of the first ten documents that fail their checksum, as text, or ""."""
    size = np.dtype(index.dtype).itemsize
    bad = []
    with (folder / shard.file).open("rb") as stream:
        for number, (offset, tokens, checksum, raw) in enumerate(
            read_sidecar(folder, shard).tolist()
        ):
            stream.seek(offset)
            if zlib.crc32(stream.read(raw or tokens * size)) != checksum:
                bad.append(str(number))
    return f"documents {', '.join(bad[:10])}{', ...' if len(bad) > 10 else ''}" if bad else ""


def _array(tar: tarfile.TarFile, member: tarfile.TarInfo, dtype: np.dtype) -> np.ndarray:
    """Return the array of a member, [n]. ValueError if it is no such .npy file."""
    stream = tar.extractfile(member) if member.isreg() and not member.issparse() else None
    if stream is None:
        raise ValueError(f"{member.name} is no file")
    array = read_npy(stream.read(), dtype)
    if array.ndim != 1:
        raise ValueError(f"{member.name} has the shape {array.shape}")
    return array
