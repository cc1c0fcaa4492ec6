"""The last stage of a build: from documents to token shards. A shard is a task that depends on its
documents only.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from memshard.data_pipeline.format.index import HELD_OUT, TEST, TRAIN, Shard, Split
from memshard.data_pipeline.format.shards import ShardWriter
from memshard.data_pipeline.prepare.documents import Unit, read_texts
from memshard.data_pipeline.prepare.split import HELD_OUT_SIDE, TEST_SIDE, TRAIN_SIDE, Splits
from memshard.data_pipeline.prepare.workers import Watch, run_tasks
from memshard.data_pipeline.tokenizer import Tokenizer
from memshard.io import atomic_write, named

BATCH_DOCUMENTS = 512  # tokenised at a time: 32 MB of text at most, enough to keep all cores busy
NAMES = {TRAIN: TRAIN_SIDE, HELD_OUT: HELD_OUT_SIDE, TEST: TEST_SIDE}


@dataclass(frozen=True)
class ShardPlan:
    """One shard: the documents of one side in a stretch of all documents. separator: between the
    sentences of a pair. parts: (unit, sizes [documents], wanted [documents]).
    """

    name: str
    dtype: str
    separator: str | None
    parts: tuple[tuple[Unit, np.ndarray, np.ndarray], ...]


def write_shards(
    units: Sequence[Unit],
    splits: Splits,
    folder: Path,
    shard_bytes: int,
    workers: int,
    separator: str | None = None,
) -> dict[str, Split]:
    """Tokenise with the tokenizer in `folder`, write every split's shards there that are not there
    yet, and return the splits of the index.

    separator: between the sentences of a pair; it becomes an <eos>. A shard ends with the document
    that brings its text to `shard_bytes`.
    """
    tokenizer = Tokenizer(folder)
    dtype = tokens_dtype(tokenizer.vocab_size)
    names: dict[str, list[str]] = {}
    todo = []
    for split, side in NAMES.items():
        names[split] = []
        for begin, end in _cuts(splits, side, shard_bytes):
            name = f"{split}-{len(names[split]):05d}"
            names[split].append(name)
            # A shard's entry is written last, so a shard without one is written anew.
            if not (folder / f"{name}.json").exists():
                todo.append(
                    (
                        ShardPlan(
                            name, dtype, separator, tuple(_parts(units, splits, side, begin, end))
                        ),
                        folder,
                    )
                )
    # Several shards: a process each, with one thread. One shard: all threads on it.
    processes = min(workers, len(todo))
    run_tasks(
        write_shard,
        [(*task, 1 if processes > 1 else workers) for task in todo],
        processes,
        "tokenising",
    )
    return {
        split: finished_split(
            folder, names[split], int(splits.sizes[of].sum()), int(splits.words[of].sum())
        )
        for split, of in ((split, splits.sides == side) for split, side in NAMES.items())
        # Without a share for it there is no test split; train and held-out are always listed.
        if names[split] or split != TEST
    }


def tokens_dtype(vocab_size: int) -> str:
    """Return the smallest type for a vocabulary."""
    return "uint16" if vocab_size <= 65_536 else "uint32"


def write_shard(watch: Watch, plan: ShardPlan, folder: Path, threads: int) -> None:
    """Write a shard, then its entry of the index as NAME.json."""
    tokenizer = Tokenizer(folder)
    texts = (text for part in plan.parts for text in read_texts(*part))
    with named(folder / plan.name), ShardWriter(folder, plan.name, plan.dtype) as writer:
        while batch := list(islice(texts, BATCH_DOCUMENTS)):
            with watch.item(0):
                for ids in _tokens(tokenizer, batch, plan.separator, threads):
                    writer.add(np.array(ids, dtype=plan.dtype))
        finish_shard(writer, folder, plan.name)


def finish_shard(writer: ShardWriter, folder: Path, name: str) -> None:
    """Close the shard and write its entry of the index, which marks it as whole."""
    with atomic_write(folder / f"{name}.json", durable=True) as file:
        file.write_text(json.dumps(dataclasses.asdict(writer.finish())), encoding="utf-8")


def _tokens(
    tokenizer: Tokenizer, batch: list[str], separator: str | None, threads: int
) -> Iterator[list[int]]:
    """Yield each document's tokens, with <eos> after it and between the sentences of a pair."""
    sides = [text.split(separator) if separator else [text] for text in batch]
    encoded = iter(tokenizer.encode_batch([side for pair in sides for side in pair], threads))
    for pair in sides:
        yield [token for _ in pair for token in (*next(encoded), tokenizer.eos_id)]


def _cuts(splits: Splits, side: int, shard_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield stretches [begin, end) of document numbers, each a shard."""
    numbers = np.flatnonzero(splits.sides == side)
    ends = np.cumsum(splits.sizes[numbers], dtype=np.int64)
    first, done = 0, 0
    while first < len(numbers):
        # By the sizes of texts alone, so cuts depend neither on the tokenizer nor on the
        # number of workers.
        last = min(int(np.searchsorted(ends, done + shard_bytes)), len(numbers) - 1)
        yield int(numbers[first]), int(numbers[last]) + 1
        first, done = last + 1, int(ends[last])


def _parts(
    units: Sequence[Unit], splits: Splits, side: int, begin: int, end: int
) -> Iterator[tuple[Unit, np.ndarray, np.ndarray]]:
    for number, unit in enumerate(units):
        start, stop = int(splits.first[number]), int(splits.first[number + 1])
        if start < end and begin < stop:
            wanted = splits.sides[start:stop] == side
            wanted[: max(begin - start, 0)] = False
            wanted[max(end - start, 0) :] = False
            yield unit, splits.sizes[start:stop], wanted


def finished_split(folder: Path, names: Sequence[str], text_bytes: int, words: int) -> Split:
    """Return the index entry of a split whose shards are written."""
    shards = tuple(
        Shard(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))) for name in names
    )
    documents, tokens = (
        sum(shard.documents for shard in shards),
        sum(shard.tokens for shard in shards),
    )
    return Split(documents, tokens, text_bytes, words, shards)
