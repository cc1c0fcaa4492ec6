"""A small corpus of made-up prose, and the data folder built from it."""

import hashlib
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from memshard.data_pipeline.format.index import Index, Split, dump_index
from memshard.data_pipeline.format.kinds import Order
from memshard.data_pipeline.format.shards import ShardWriter
from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data

ORDERS: tuple[Order, ...] = "contiguous", "shuffled", "best-fit"
WORDS = [
    first + last
    for first in ("ba", "de", "fi", "go", "lu", "ma", "ne")
    for last in ("ck", "ld", "m", "n", "rt", "st", "x", "zz")
]


def write_corpus(folder: Path, documents: int = 300, seed: int = 0) -> None:
    """Write one file a document, of very different lengths."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(documents):
        words = [f"document {number}", *draw.choices(WORDS, k=draw.choice([3, 30, 300]))]
        (folder / f"{number:04d}.txt").write_text(" ".join(words) + ".\n", encoding="utf-8")


def build(
    source: Path, out: Path, vocab_size: int = 500, held_out: float = 0.1, shard_bytes: int = 80_000
) -> dict:
    return build_data(
        Sources(find_files([source])),
        out,
        vocab_size=vocab_size,
        held_out=held_out,
        shard_bytes=shard_bytes,
        workers=1,
    )


def write_numbered(folder: Path, lengths: list[int]) -> None:
    """Write a data folder whose training tokens are 1, 2, 3 and so on, in documents of these
    lengths without an end: no two are equal. 0 is <eos>.
    """
    folder.mkdir(parents=True)
    documents = np.split(1 + np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    splits = {}
    for name, parts in (("train", documents), ("heldout", documents[:2])):
        with ShardWriter(folder, f"{name}-00000", "uint32") as writer:
            for part in parts:
                writer.add(part)
            shard = writer.finish()
        splits[name] = Split(shard.documents, shard.tokens, 0, 0, (shard,))
    (folder / "tokenizer.model").touch()
    empty = hashlib.sha256(b"").hexdigest()
    index = Index("uint32", sum(lengths) + 1, 0, "tokenizer.model", empty, splits)
    (folder / "index.json").write_text(dump_index(index), encoding="utf-8")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "text"
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "data"
    build(corpus, out)
    return out
