"""Check a data folder: every file against its hash, every count against the content."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from memshard.data_pipeline.format.index import Index, Shard, load_index, sha256_file
from memshard.data_pipeline.format.shards import read_sidecar


def verify_data(path: str | os.PathLike[str]) -> dict:
    """Re-hash everything and compare counts; return totals, or raise ValueError naming every bad file."""
    folder = Path(path)
    index = load_index(folder)
    problems = []
    if sha256_file(folder / index.tokenizer) != index.tokenizer_sha256:
        problems.append(f"{index.tokenizer}: content differs from its hash")
    shards = [shard for split in index.splits.values() for shard in split.shards]
    for shard in tqdm(shards, "verifying", unit="shard", disable=None, leave=False):
        problems += _problems(folder, index, shard)
    if problems:
        raise ValueError(f"{folder} is damaged: {'; '.join(problems)}. Copy these files again, or build the data set again")
    return {"data": str(folder), "shards": len(shards), "bytes": sum(shard.bytes for shard in shards)} | {
        name: {"documents": split.documents, "tokens": split.tokens} for name, split in index.splits.items()
    }


def _problems(folder: Path, index: Index, shard: Shard) -> list[str]:
    changed = [
        name
        for name, sha256 in ((shard.file, shard.sha256), (shard.sidecar, shard.sidecar_sha256))
        if sha256_file(folder / name) != sha256
    ]
    if changed:
        return [f"{name}: content differs from its hash" for name in changed]
    entries = read_sidecar(folder, shard)
    documents, largest = [], 0
    with tarfile.open(folder / shard.file) as tar:
        members = list(tar)
        for tokens, lengths in zip(members[::2], members[1::2], strict=True):
            ids, counts = _array(tar, tokens), _array(tar, lengths)
            begins = tokens.offset_data + tokens.size - ids.nbytes + (np.cumsum(counts, dtype=np.int64) - counts) * ids.itemsize
            documents.append(np.stack([begins, counts], axis=1))
            largest = max(largest, int(ids.max()))
    if not np.array_equal(np.concatenate(documents), entries[:, :2]):
        return [f"{shard.sidecar}: does not list the documents of {shard.file}"]
    return [f"{shard.file}: token {largest} is outside the vocabulary"] if largest >= index.vocab_size else []


def _array(tar: tarfile.TarFile, member: tarfile.TarInfo) -> np.ndarray:
    content = tar.extractfile(member)
    assert content is not None
    array: np.ndarray = np.lib.format.read_array(io.BytesIO(content.read()))
    return array
