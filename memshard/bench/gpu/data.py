"""Token shards made on the spot, without a tokenizer or any package for one."""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from memshard.data_pipeline.format.index import (
    HELD_OUT,
    INDEX_FILE,
    TRAIN,
    Index,
    Split,
    dump_index,
)
from memshard.data_pipeline.format.shards import ShardWriter
from memshard.data_pipeline.tokenizer import TOKENIZER_FILE

BYTES = 257
"""Vocabulary of text as bytes: 0 ends a document, byte b is token b + 1."""


def write_shards(
    folder: Path, vocab_size: int, train: Iterable[np.ndarray], held_out: Iterable[np.ndarray]
) -> Path:
    """Write a data folder of documents, each [n] tokens of which the last is 0, and return it."""
    folder.mkdir(parents=True)
    splits = {}
    for name, documents in ((TRAIN, train), (HELD_OUT, held_out)):
        with ShardWriter(folder, f"{name}-00000", "uint16") as writer:
            for document in documents:
                writer.add(document)
            shard = writer.finish()
        splits[name] = Split(shard.documents, shard.tokens, 0, 0, (shard,))
    # A data folder has a tokenizer; nothing reads this one.
    (folder / TOKENIZER_FILE).touch()
    empty = hashlib.sha256(b"").hexdigest()
    index = Index("uint16", vocab_size, 0, TOKENIZER_FILE, empty, splits)
    (folder / INDEX_FILE).write_text(dump_index(index), encoding="utf-8")
    return folder


def random_shards(folder: Path, vocab_size: int, tokens: int, seed: int = 0) -> Path:
    """Write about so many tokens, in documents of 4 to 400, whose next token is one of eight with
    the same remainder most of the time: something can be learned.
    """
    draw = np.random.default_rng(seed)

    def documents(least: int) -> Iterator[np.ndarray]:
        written = 0
        while written < least:
            length = int(draw.choice([4, 40, 400]))
            steps = draw.integers(0, 8, length) + 8 * (draw.random(length) < 0.1)
            yield np.append(1 + steps.cumsum() % (vocab_size - 1), 0)
            written += length + 1

    return write_shards(folder, vocab_size, documents(tokens), documents(max(2000, tokens // 50)))


def python_shards(folder: Path, most: int) -> Path:
    """Write the files of Python's standard library as bytes, up to `most` of them; one in fifty is
    held out.
    """

    def documents(held_out: bool) -> Iterator[np.ndarray]:
        written = 0
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
        for number, path in enumerate(path for path in files if "site-packages" not in path.parts):
            if (number % 50 == 0) == held_out and written < most:
                text = np.frombuffer(path.read_bytes(), np.uint8).astype(np.uint16)
                yield np.append(text + np.uint16(1), np.uint16(0))
                written += len(text) + 1

    return write_shards(folder, BYTES, documents(False), documents(True))
