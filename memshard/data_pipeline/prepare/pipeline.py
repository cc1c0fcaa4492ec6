"""Build a data folder: documents, duplicates, held-out split, tokenizer, token shards, index and
report.

Every stage keeps what it has finished in a work folder next to the output, under names that say
what went in. A build that was killed resumes there; other settings redo what they change. The
result is the same, byte for byte.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from memshard.data_pipeline.format.index import INDEX_FILE, REPORT_FILE, Index, dump_index
from memshard.data_pipeline.prepare.documents import (
    Filters,
    Unit,
    plan_units,
    read_texts,
    write_unit,
)
from memshard.data_pipeline.prepare.inputs.files import Sources, count_endings
from memshard.data_pipeline.prepare.inputs.kinds import MAX_DOCUMENT, PAIR
from memshard.data_pipeline.prepare.report import NOT_UTF8, READ, make_report, warn_of_little
from memshard.data_pipeline.prepare.sample import sample_lines
from memshard.data_pipeline.prepare.split import (
    TRAIN_SIDE,
    Splits,
    check_amounts,
    split_documents,
)
from memshard.data_pipeline.prepare.workers import cores, run_tasks
from memshard.data_pipeline.prepare.write_shards import tokens_dtype, write_shards
from memshard.data_pipeline.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    TokenizerModel,
    train_tokenizer,
)
from memshard.io import atomic_write, to_disk
from memshard.lock import FolderLock, holding

SAMPLE_BYTES = 1 << 28  # of text that the lines are drawn from
HELD_OUT_SHARE, HELD_OUT_ARTICLES = 0.01, 5000
LEAST_PIECE = 2048  # characters; a shorter piece would be a context for few of its tokens
TRIED_DOCUMENTS = 200


def build_data(
    sources: Sources,
    out: str | os.PathLike[str],
    *,
    vocab_size: int = 8192,
    model: TokenizerModel = "bpe",
    tokenizer: str | os.PathLike[str] | None = None,
    filters: Filters | None = None,
    deduplicate: bool | Literal["web"] = False,
    held_out: float | None = None,
    test: float | None = None,
    web: bool = False,
    shard_bytes: int = 1 << 28,
    seed: int = 0,
    page_seconds: float = 20.0,
    workers: int | None = None,
) -> dict:
    """Write the data folder `out` and return its report. The same sources and settings give the
    same bytes.

    tokenizer: a model file or data folder whose tokenizer to use, instead of training one.
    deduplicate: drop equal documents but the first, and with `filters.near` similar ones; "web"
    keeps those that are not of the web. held_out, test: share of the documents (below 1) or number
    of them, chosen by the hash of their text; by default 1 % and none, with `web` 5,000 each but no
    more than 1 % (Lample et al. 2019, section 4.1, hold out 5,000 + 5,000 articles). shard_bytes:
    of text in a shard. page_seconds: CPU time that a web page may take. workers: processes, by
    default one a core. Raises ValueError or FileNotFoundError with the fix; what was finished then
    stays in the work folder, and `out` is not touched.
    """
    target = Path(out).resolve()
    _check(target, held_out, test, vocab_size, shard_bytes)
    given = Tokenizer(tokenizer) if tokenizer else None  # before hours of reading
    filters = filters or Filters()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.work"
    with alone(work) as lock:
        units = _read(sources, filters, work, page_seconds, workers)
        amounts = _amounts(held_out, test, web, units)
        if longest := _finer(units, amounts):
            sources = dataclasses.replace(sources, longest=longest)
            units = _read(sources, filters, work, page_seconds, workers)
        # Over all units at once: a document is a duplicate wherever the other one is.
        splits = split_documents(units, filters, deduplicate, *amounts)
        stages, not_utf8 = _stages(units, splits), _not_utf8(units)
        if not stages["kept.documents"]:
            # Only what this build has read: the folder may hold what another one left.
            for unit in units:
                shutil.rmtree(unit.folder)
            raise ValueError(
                f"the corpus is empty: {_describe(sources, stages, not_utf8)}; name sources with "
                "text"
            )

        if given:
            given.warn_if_lossy(list(_texts(units, splits, _some(splits))))
        proto = given.proto if given else _trained(units, splits, work, vocab_size, model, seed)
        names = [unit.folder.name for unit in units]
        # The name says what goes in, so another tokenizer or split begins new shards.
        final = work / f"data-{digest(proto, splits.sides.tobytes(), shard_bytes, *names)}"
        final.mkdir(exist_ok=True)
        with atomic_write(final / TOKENIZER_FILE, durable=True) as file:
            file.write_bytes(proto)
        written = write_shards(
            units,
            splits,
            final,
            shard_bytes,
            workers or cores(),
            sources.chosen.separator,
        )
        warn_of_little(written)
        used = Tokenizer(final)
        index = Index(
            tokens_dtype(used.vocab_size),
            used.vocab_size,
            used.eos_id,
            TOKENIZER_FILE,
            used.sha256,
            written,
            sources.chosen.record_kind,
        )
        report = make_report(len(sources.files), sources.passed_over, not_utf8, stages, index)
        publish(final, target, index, report)
        lock.remove_folder()
    return report


def _read(
    sources: Sources, filters: Filters, work: Path, page_seconds: float, workers: int | None
) -> list[Unit]:
    """Read the units that are not in the work folder yet, and return all."""
    units = plan_units(sources, filters, work)
    tasks = [(unit, sources, filters) for unit in units if not unit.folder.is_dir()]
    timed = any(sources.source_of(file).timed for file in sources.files)
    processes = min(workers or cores(), len(tasks))
    run_tasks(write_unit, tasks, processes, "reading", page_seconds if timed else None)
    return units


def _finer(units: list[Unit], amounts: tuple[float, float]) -> int | None:
    """Return to how many characters to cut documents where the corpus is a few long texts, of which
    a share to hold out is less than one piece: that piece would be any size, from a few words on.
    """
    counts: Counter[str] = Counter()
    for unit in units:
        counts.update(_outcome(unit)["counts"])
    pieces, size = counts["kept.documents"], counts["kept.bytes"]
    share = min((amount for amount in amounts if 0 < amount < 1), default=1.0)
    few_long_texts = counts["cut"] and size > pieces * MAX_DOCUMENT / 2
    if not few_long_texts or share * pieces >= 1:
        return None
    # Two pieces make up the share: no more breaks in the text than that takes.
    return max(int(size * share / 2), LEAST_PIECE)


def publish(final: Path, target: Path, index: Index, report: dict) -> None:
    """Make the folder `final` of finished shards the data folder `target`."""
    text = json.dumps(report, indent=1) + "\n"
    index = dataclasses.replace(index, report_sha256=hashlib.sha256(text.encode()).hexdigest())
    for name, content in ((REPORT_FILE, text), (INDEX_FILE, dump_index(index))):
        with atomic_write(final / name, durable=True) as file:
            file.write_text(content, encoding="utf-8")
    for leftover in (*final.glob("*.json"), *final.glob("*.partial")):
        if leftover.name not in (REPORT_FILE, INDEX_FILE):
            leftover.unlink()
    if target.exists():
        target.rmdir()  # it is empty: check_target refuses others
    to_disk(final)
    # Until here `target` did not exist, so no reader ever sees half a data set.
    final.rename(target)
    # The work folder, which could repeat all of it, is removed next.
    to_disk(target.parent)


def check_target(target: Path) -> None:
    """Raise ValueError if there is something at `target` already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already: choose another --out, or remove it first")


def _amounts(
    held_out: float | None, test: float | None, web: bool, units: list[Unit]
) -> tuple[float, float]:
    if held_out is None:
        documents = sum(_outcome(unit)["counts"].get("kept.documents", 0) for unit in units)
        held_out = (
            HELD_OUT_ARTICLES
            if web and documents > HELD_OUT_ARTICLES / HELD_OUT_SHARE
            else HELD_OUT_SHARE
        )
    return held_out, (held_out if web else 0.0) if test is None else test


def _check(
    target: Path, held_out: float | None, test: float | None, vocab_size: int, shard_bytes: int
) -> None:
    check_target(target)
    check_amounts(held_out, test)
    if vocab_size < 1:
        raise ValueError(f"--vocab is {vocab_size}; it must be at least 1")
    if shard_bytes < 1:
        raise ValueError(f"--shard-bytes is {shard_bytes}; it must be at least 1")


@contextmanager
def alone(work: Path) -> Iterator[FolderLock]:
    """Lock the work folder and clear it of half-written units; remove it at the end if it has no
    finished ones. FolderHeld if another build has it.
    """
    with holding(work, "choose another --out") as lock:
        (work / "units").mkdir(exist_ok=True)
        _remove_partial(work)
        try:
            yield lock
        finally:
            if work.exists():
                _remove_partial(work)
                if not any(work.glob("units/*")):
                    lock.remove_folder()


def _remove_partial(work: Path) -> None:
    for partial in work.glob("units/*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _stages(units: list[Unit], splits: Splits) -> Counter[str]:
    stages: Counter[str] = Counter()
    for unit in units:
        stages.update(_outcome(unit)["counts"])
    return stages + splits.counts


def _not_utf8(units: list[Unit]) -> list[str]:
    return [name for unit in units for name in _outcome(unit)["not_utf8"]]


def _outcome(unit: Unit) -> dict:
    outcome: dict = json.loads((unit.folder / "counts.json").read_text(encoding="utf-8"))
    return outcome


def _describe(sources: Sources, stages: Counter[str], not_utf8: list[str]) -> str:
    """Return what became of the sources, as text."""
    skipped = f"{len(not_utf8)} {NOT_UTF8}, e.g. {not_utf8[0]}" if not_utf8 else "all readable"
    left_out = [
        f"{number:,} {key.removesuffix('.documents')}"
        for key, number in stages.items()
        if key in READ or key.startswith("fault_") or key.endswith(".documents")
    ]
    return "; ".join(
        [
            f"{len(sources.files)} files ({skipped})",
            f"{stages['empty']} empty and {stages['invalid']} invalid documents",
            *([f"stages: {', '.join(left_out)}"] if left_out else []),
            *(
                [f"passed over in folders: {count_endings(sources.passed_over)}"]
                if sources.passed_over
                else []
            ),
        ]
    )


def _trained(
    units: list[Unit], splits: Splits, work: Path, vocab_size: int, model: TokenizerModel, seed: int
) -> bytes:
    """Return a tokenizer trained on a uniform sample of the training documents' lines."""
    names = [unit.folder.name for unit in units]
    key = digest(splits.sides.tobytes(), vocab_size, model, seed, *names)
    cached = work / f"tokenizer-{key}"
    if cached.exists():
        return cached.read_bytes()
    train = splits.sides == TRAIN_SIDE
    total = int(splits.sizes[train].sum())
    if total > SAMPLE_BYTES:
        # Those with the highest hashes, a random choice; those with the lowest are held out.
        train &= splits.hashes >> 40 >= int((1 - SAMPLE_BYTES / total) * (1 << 24))
    texts = _texts(units, splits, train)
    proto = train_tokenizer(sample_lines(texts, seed), vocab_size, model)
    with atomic_write(cached, durable=True) as file:
        file.write_bytes(proto)
    return proto


def _texts(units: list[Unit], splits: Splits, wanted: np.ndarray) -> Iterator[str]:
    """Yield the texts of the wanted documents, bool [documents]; both sentences of a pair are lines
    of their own to the tokenizer.
    """
    documents = (slice(first, last) for first, last in pairwise(splits.first.tolist()))
    for unit, of_unit in zip(units, documents, strict=True):
        for text in read_texts(unit, splits.sizes[of_unit], wanted[of_unit]):
            yield text.replace(PAIR, "\n")


def _some(splits: Splits) -> np.ndarray:
    """Return which documents to try a tokenizer on: some of those to train on."""
    train = splits.sides == TRAIN_SIDE
    # Those with the highest hashes: a random choice from all sources.
    return train & (splits.hashes >= np.sort(splits.hashes[train])[-TRIED_DOCUMENTS:][0])


def digest(*facts: object) -> str:
    """Return a name for what is made of these facts: a hash of them."""
    total = hashlib.blake2b(digest_size=8)
    for fact in facts:
        # ";" keeps apart what would read alike when joined: 1, 23 and 12, 3.
        total.update(fact if isinstance(fact, bytes) else f"{fact};".encode())
    return total.hexdigest()
