"""The first stage of a build: from one unit of input to its documents, filtered, with their
signatures.

A unit is a WARC file, or some smaller text files together. Its result is a folder that appears
under its name when it is whole, and the name says what went in: a build that was killed finds what
it had done, and other settings find nothing.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memshard.data_pipeline.fetch import fetch, is_url
from memshard.data_pipeline.prepare.duplicates import BANDS, band_keys, exact_hash
from memshard.data_pipeline.prepare.inputs import (
    Sources,
    is_utf8,
    is_warc,
    read_documents,
    read_pairs,
)
from memshard.data_pipeline.prepare.workers import ItemTimeout, Watch
from memshard.io import partial_path

UNIT_BYTES = 1 << 26  # of small text files that make a unit
ROWS_IN_MEMORY = 4096
TEXTS, ROWS_FILE, COUNTS = "texts", "documents", "counts.json"
ROW = np.dtype([("bytes", "<u4"), ("words", "<u4"), ("exact", "<u8")])
NEAR_ROW = np.dtype([*ROW.descr, ("bands", "<u8", (BANDS,))])


@dataclass(frozen=True)
class Filters:
    """Which documents stay. extractor: for WARC pages; language: ISO 639-1 or None for any; near:
    whether to take signatures.
    """

    extractor: str = "trafilatura"
    language: str | None = None
    quality: bool = False
    near: bool = False


@dataclass(frozen=True)
class Unit:
    """Input files read together, and the folder that holds the result."""

    files: tuple[str, ...]
    folder: Path


def plan_units(sources: Sources, filters: Filters, work: Path) -> list[Unit]:
    """Units in the order of the sources."""
    groups: list[list[str]] = []
    room = 0
    if sources.documents == "pairs":
        names = [str(file) for file in sources.files]
        if len(names) % 2 or any(map(is_url, names)):
            raise ValueError(
                "--documents pairs needs source and target files in turn, on this machine, and "
                f"got {len(names)}: {names}"
            )
        groups = [names[place : place + 2] for place in range(0, len(names), 2)]
        return [
            Unit(tuple(group), work / "units" / _key(group, sources, filters)) for group in groups
        ]
    for file in map(str, sources.files):
        size = 0 if is_url(file) else Path(file).stat().st_size
        if not groups or is_warc(file) or is_url(file) or size > room:
            groups.append([])
            room = -1 if is_warc(file) or is_url(file) else UNIT_BYTES
        groups[-1].append(file)
        room -= size
    return [Unit(tuple(group), work / "units" / _key(group, sources, filters)) for group in groups]


def _key(files: list[str], sources: Sources, filters: Filters) -> str:
    facts = [
        [
            file,
            *(() if is_url(file) else (Path(file).stat().st_size, Path(file).stat().st_mtime_ns)),
        ]
        for file in files
    ]
    settings = [2, facts, sources.documents, sources.text_key, dataclasses.astuple(filters)]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def write_unit(watch: Watch, unit: Unit, sources: Sources, filters: Filters) -> None:
    """Read a unit and write its result."""
    partial = partial_path(unit.folder)
    partial.mkdir(parents=True)
    counts: Counter[str] = Counter()
    skipped: list[str] = []
    rows: list[tuple] = []
    dtype = NEAR_ROW if filters.near else ROW
    with (partial / TEXTS).open("wb") as texts, (partial / ROWS_FILE).open("wb") as table:
        for text in _documents(watch, unit, sources, filters, counts, skipped, partial):
            content = text.encode()
            texts.write(content)
            row = (len(content), len(text.split()), exact_hash(text))
            rows.append((*row, band_keys(text)) if filters.near else row)
            if len(rows) == ROWS_IN_MEMORY:
                table.write(np.array(rows, dtype=dtype).tobytes())
                rows.clear()
        table.write(np.array(rows, dtype=dtype).tobytes())
        for stream in (texts, table):
            stream.flush()
            os.fsync(stream.fileno())
    (partial / COUNTS).write_text(
        json.dumps({"counts": +counts, "not_utf8": skipped}), encoding="utf-8"
    )
    try:
        partial.rename(unit.folder)
    except OSError:
        if not unit.folder.is_dir():
            raise
        shutil.rmtree(partial)


def read_rows(unit: Unit, filters: Filters) -> np.ndarray:
    """The table of a finished unit, structured as ROW or NEAR_ROW."""
    return np.fromfile(unit.folder / ROWS_FILE, dtype=NEAR_ROW if filters.near else ROW)


def read_texts(unit: Unit, sizes: np.ndarray, wanted: np.ndarray) -> Iterator[str]:
    """The wanted documents of a finished unit. sizes: their bytes [documents]; wanted: bool
    [documents].
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    with (unit.folder / TEXTS).open("rb") as texts:
        for number in np.flatnonzero(wanted).tolist():
            size = int(sizes[number])
            texts.seek(int(ends[number]) - size)
            yield texts.read(size).decode()


def _documents(
    watch: Watch,
    unit: Unit,
    sources: Sources,
    filters: Filters,
    counts: Counter[str],
    skipped: list[str],
    scratch: Path,
) -> Iterator[str]:
    if sources.documents == "pairs":
        yield from _filtered(
            watch, read_pairs(Path(unit.files[0]), Path(unit.files[1]), counts), filters, counts
        )
        return
    for name in unit.files:
        file = fetch(name, scratch) if is_url(name) else Path(name)
        if is_warc(name):
            from memshard.data_pipeline.prepare.web_pages import read_articles

            documents = read_articles(watch, file, filters.extractor, filters.language, counts)
        elif is_utf8(file):
            documents = read_documents(file, sources, counts)
        else:
            skipped.append(name)
            continue
        yield from _filtered(watch, documents, filters, counts)
        if is_url(name):
            file.unlink()


def _filtered(
    watch: Watch, documents: Iterator[str], filters: Filters, counts: Counter[str]
) -> Iterator[str]:
    """Documents in the language that are prose, counted by what they failed, in documents and
    bytes.
    """
    for number, text in enumerate(documents):
        size = len(text.encode())
        count(counts, "text", size)
        try:
            with watch.item(1 << 40 | number):
                reason = "timeout" if 1 << 40 | number in watch.skip else _reason(text, filters)
        except ItemTimeout:
            reason = "timeout"
        count(counts, reason or "kept", size)
        if reason is None:
            yield text


def _reason(text: str, filters: Filters) -> str | None:
    if filters.language is not None:
        from memshard.data_pipeline.web.language import detect_language

        if detect_language(text) != filters.language:
            return "language"
    if filters.quality:
        from memshard.data_pipeline.web.quality import failed_rule

        if rule := failed_rule(text, english=filters.language == "en"):
            return f"quality.{rule}"
    return None


def count(counts: Counter[str], name: str, size: int) -> None:
    """Count a document and its bytes."""
    counts[f"{name}.documents"] += 1
    counts[f"{name}.bytes"] += size
