"""Build a data folder: tokenizer, train and held-out token shards, index and report.

Two passes over the sources, so memory does not grow with the corpus: the first counts and samples lines for the
tokenizer, the second tokenises and writes.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from memshard.data_pipeline.build.sources import Sources, is_utf8, read_documents
from memshard.data_pipeline.format.index import HELD_OUT, INDEX_FILE, TRAIN, Index, dump_index
from memshard.data_pipeline.format.shards import ShardWriter
from memshard.data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerModel, train_tokenizer, training_lines

SAMPLE_LINES = 200_000
BATCH_DOCUMENTS = 512  # tokenised at a time: 32 MB of text at most, enough to keep all cores busy
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class Survey:
    """What the first pass found."""

    files: tuple[Path, ...]
    not_utf8: tuple[Path, ...]
    counts: Counter[str]
    held_out_below: int
    lines: list[str]


def build_data(
    sources: Sources,
    out: str | os.PathLike[str],
    *,
    vocab_size: int = 8192,
    model: TokenizerModel = "bpe",
    held_out: float = 0.01,
    shard_tokens: int = 1 << 26,
    seed: int = 0,
) -> dict:
    """Write the data folder `out` and return its report. The same sources and settings give the same bytes.

    held_out: share of the documents, chosen by a hash of their text, so equal texts are on one side. Everything is written
    to a folder beside `out` and renamed at the end. Raises ValueError or FileNotFoundError with the fix.
    """
    target = Path(out).resolve()
    _check(target, held_out, vocab_size, shard_tokens)
    survey = _survey(sources, held_out, seed)
    proto = train_tokenizer(survey.lines, vocab_size, model)

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        (partial / TOKENIZER_FILE).write_bytes(proto)
        index = _write_shards(sources, survey, partial, shard_tokens)
        report = _report(sources, survey, index)
        (partial / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (partial / INDEX_FILE).write_text(dump_index(index), encoding="utf-8")
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def _check(target: Path, held_out: float, vocab_size: int, shard_tokens: int) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already: choose another --out, or remove it first")
    if not 0 < held_out < 1:
        raise ValueError(f"--held-out is {held_out}; it is the share of documents kept for evaluation, above 0 and below 1")
    if vocab_size < 1:
        raise ValueError(f"--vocab is {vocab_size}; it must be at least 1")
    if shard_tokens < 1:
        raise ValueError(f"--shard-tokens is {shard_tokens}; it must be at least 1")


def _survey(sources: Sources, held_out: float, seed: int) -> Survey:
    """First pass: count documents, find the held-out threshold, sample lines of training documents."""
    counts: Counter[str] = Counter()
    not_utf8 = []
    lowest, highest, threshold = 1 << 64, 0, int(held_out * (1 << 64))
    draw = random.Random(seed)
    lines: list[str] = []
    seen = 0
    for file in tqdm(sources.files, "reading", unit="file", disable=None, leave=False):
        if not is_utf8(file):
            not_utf8.append(file)
            continue
        for text in read_documents(file, sources, counts):
            number = text_hash(text)
            lowest, highest = min(lowest, number), max(highest, number)
            counts["documents"] += 1
            if number < threshold:
                counts["held_out"] += 1
                continue
            for line in training_lines(text):  # a uniform sample of bounded size (reservoir sampling)
                seen += 1
                if len(lines) < SAMPLE_LINES:
                    lines.append(line)
                elif (place := int(draw.random() * seen)) < SAMPLE_LINES:
                    lines[place] = line
    files = tuple(file for file in sources.files if file not in set(not_utf8))
    if not counts["documents"]:
        raise ValueError(f"the corpus is empty: {_describe(sources, counts, not_utf8)}; name sources with text")
    if lowest == highest:
        raise ValueError(
            f"the corpus is one document ({counts['documents']} times), so none is left to train on after the held-out split: "
            "give more text, or take every line as a document with --documents line"
        )
    if not counts["held_out"]:
        threshold = lowest + 1
    elif counts["held_out"] == counts["documents"]:
        raise ValueError(f"all {counts['documents']} documents fall into the held-out split: lower --held-out, or give more documents")
    return Survey(files, tuple(not_utf8), counts, threshold, lines)


def _describe(sources: Sources, counts: Counter[str], not_utf8: list[Path]) -> str:
    skipped = f"{len(not_utf8)} not UTF-8 text, e.g. {not_utf8[0]}" if not_utf8 else "all UTF-8 text"
    return f"{len(sources.files)} files ({skipped}), {counts['empty']} empty and {counts['invalid']} invalid documents"


def text_hash(text: str) -> int:
    """64-bit hash of a text; the same on every machine and in every corpus."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _write_shards(sources: Sources, survey: Survey, folder: Path, shard_tokens: int) -> Index:
    """Second pass: tokenise and write."""
    tokenizer = Tokenizer(folder)
    dtype = "uint16" if tokenizer.vocab_size <= 65_535 else "uint32"
    writers = {split: ShardWriter(folder, split, dtype, shard_tokens) for split in (TRAIN, HELD_OUT)}
    documents = (text for file in survey.files for text in read_documents(file, sources, Counter()))
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    progress = tqdm(total=survey.counts["documents"], desc="tokenising", unit="document", unit_scale=True, disable=None, leave=False)
    try:
        with progress:
            for batch in _batches(documents, BATCH_DOCUMENTS):
                for text, ids in zip(batch, tokenizer.encode_batch(batch, threads), strict=True):
                    split = HELD_OUT if text_hash(text) < survey.held_out_below else TRAIN
                    tokens = np.array([*ids, tokenizer.eos_id], dtype=dtype)
                    writers[split].add(tokens, text_bytes=len(text.encode()), words=len(text.split()))
                progress.update(len(batch))
        splits = {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    written = sum(split.documents for split in splits.values())
    if written != survey.counts["documents"]:
        raise ValueError(f"the sources changed while they were read ({survey.counts['documents']} documents, then {written}): build again")
    return Index(dtype, tokenizer.vocab_size, tokenizer.eos_id, TOKENIZER_FILE, tokenizer.sha256, splits)


def _batches(documents: Iterator[str], size: int) -> Iterable[list[str]]:
    while batch := list(islice(documents, size)):
        yield batch


def _report(sources: Sources, survey: Survey, index: Index) -> dict:
    totals = {name: dataclasses.asdict(split) for name, split in index.splits.items()}
    return {
        "files": len(sources.files),
        "files_not_utf8": len(survey.not_utf8),
        "files_not_utf8_first": [str(file) for file in survey.not_utf8[:20]],
        "documents": survey.counts["documents"],
        "documents_empty": survey.counts["empty"],
        "documents_invalid": survey.counts["invalid"],
        "documents_cut": survey.counts["cut"],
        "vocabulary": index.vocab_size,
        "splits": {
            name: {
                **{key: totals[name][key] for key in ("documents", "tokens", "text_bytes", "words")},
                "bytes_per_token": round(split.text_bytes / split.tokens, 4),
                "shards": len(split.shards),
            }
            for name, split in index.splits.items()
        },
    }
