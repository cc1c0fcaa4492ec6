"""The first stage of a build: from one unit of input to its documents, filtered, with their
signatures.

A unit is a large file, such as a WARC, or some smaller ones together. Its result is a folder that
appears under its name when it is whole, and the name says what went in: a build that was killed
finds what it had done, and other settings find nothing.
"""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from memshard.data_pipeline.fetch import fetch, is_url
from memshard.data_pipeline.prepare.duplicates import BANDS, band_keys, exact_hash
from memshard.data_pipeline.prepare.inputs.encodings import text_encoding
from memshard.data_pipeline.prepare.inputs.files import Sources, reader
from memshard.data_pipeline.prepare.inputs.kinds import Source
from memshard.data_pipeline.prepare.workers import ItemTimeout, Watch
from memshard.io import atomic_write, named, partial_path, sync

UNIT_BYTES = 1 << 26  # of small text files that make a unit
SETTINGS_VERSION = 7  # counted up when units would be read otherwise: older ones are not reused
ROWS_IN_MEMORY = 4096
TEXTS, ROWS_FILE, COUNTS = "texts", "documents", "counts.json"
ROW = np.dtype([("bytes", "<u4"), ("words", "<u4"), ("exact", "<u8")])
NEAR_ROW = np.dtype([*ROW.descr, ("bands", "<u8", (BANDS,))])


@dataclass(frozen=True)
class Filters:
    """Which documents stay. language: ISO 639-1 or None for any. quality: only prose. near:
    whether to compute the signatures by which near duplicates are found. web: what holds for text
    of the web, if that is something else.
    """

    language: str | None = None
    quality: bool = False
    near: bool = False
    web: "Filters | None" = None

    def of(self, source: Source) -> "Filters":
        """Return what holds for the documents of a source."""
        return self.web if source.web and self.web else self


@dataclass(frozen=True)
class Unit:
    """Input files read together, and the folder that holds the result. web: they are text of the
    web.
    """

    files: tuple[str, ...]
    folder: Path
    web: bool = False


def plan_units(sources: Sources, filters: Filters, work: Path) -> list[Unit]:
    """Return the units in the order of the sources. ValueError if files that belong together are
    not complete.
    """
    units = []
    for group in _groups(sources):
        key = _key(group, sources, filters)
        # Files of the web are units of their own.
        web = sources.source_of(group[0]).web
        units.append(Unit(tuple(group), work / "units" / key, web))
    return units


def _groups(sources: Sources) -> list[list[str]]:
    """Return the files of each unit."""
    names, chosen = [str(file) for file in sources.files], sources.chosen
    if chosen.takes_all and chosen.unit:
        if len(names) % chosen.unit or any(map(is_url, names)):
            raise ValueError(
                f"--documents {chosen.name} needs {chosen.takes}, on this machine, and "
                f"got {len(names)}: {names}"
            )
        starts = range(0, len(names), chosen.unit)
        return [names[start : start + chosen.unit] for start in starts]
    groups: list[list[str]] = []
    room = 0
    for name in names:
        alone = is_url(name) or sources.source_of(name).unit is not None
        size = 0 if is_url(name) else Path(name).stat().st_size
        if not groups or alone or size > room:
            groups.append([])
            # -1: nothing is added to a unit of one large file.
            room = -1 if alone else UNIT_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def _key(files: list[str], sources: Sources, filters: Filters) -> str:
    """Return a hash of all that decides what a unit's result is."""
    facts = [
        [
            file,
            *(() if is_url(file) else (Path(file).stat().st_size, Path(file).stat().st_mtime_ns)),
        ]
        for file in files
    ]
    settings = [
        SETTINGS_VERSION,
        facts,
        sources.documents,
        sorted(sources.settings.items()),
        dataclasses.astuple(filters),
        [[name, version(name)] for name in sources.source_of(files[0]).packages],
    ]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def write_unit(watch: Watch, unit: Unit, sources: Sources, filters: Filters) -> None:
    """Read a unit and write its result: texts, a row a document, counts."""
    partial = partial_path(unit.folder)
    partial.mkdir(parents=True)
    counts: Counter[str] = Counter()
    skipped: list[str] = []
    rows: list[tuple] = []
    dtype = NEAR_ROW if filters.near else ROW
    with (
        named(partial),  # closing a file writes, too, so the outermost
        (partial / TEXTS).open("wb") as texts,
        (partial / ROWS_FILE).open("wb") as table,
    ):
        for text in _documents(watch, unit, sources, filters, counts, skipped, partial):
            content = text.encode()
            texts.write(content)
            row = (len(content), len(text.split()), exact_hash(text))
            rows.append((*row, band_keys(text)) if filters.near else row)
            # A row with bands is a tuple of Python numbers, some 10 times as large as in the file.
            if len(rows) == ROWS_IN_MEMORY:
                table.write(np.array(rows, dtype=dtype).tobytes())
                rows.clear()
        table.write(np.array(rows, dtype=dtype).tobytes())
        for stream in (texts, table):
            stream.flush()
            sync(stream.fileno())
    with atomic_write(partial / COUNTS, durable=True) as file:
        file.write_text(json.dumps({"counts": +counts, "not_utf8": skipped}), encoding="utf-8")
    try:
        # Renamed when whole: a folder under its name is finished. Another worker may have
        # been as quick.
        partial.rename(unit.folder)
    except OSError:
        if not unit.folder.is_dir():
            raise
        shutil.rmtree(partial)


def read_rows(unit: Unit, filters: Filters) -> np.ndarray:
    """Return the rows of a finished unit, structured as ROW or NEAR_ROW."""
    return np.fromfile(unit.folder / ROWS_FILE, dtype=NEAR_ROW if filters.near else ROW)


def read_texts(unit: Unit, sizes: np.ndarray, wanted: np.ndarray) -> Iterator[str]:
    """Yield the wanted documents of a finished unit.

    sizes: bytes of all [documents]; wanted: bool [documents].
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    with named(unit.folder / TEXTS), (unit.folder / TEXTS).open("rb") as texts:
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
    """Yield the documents of a unit that pass the filters; add files that are not text to
    `skipped`, which the report lists.
    """
    together = (sources.chosen.unit or 1) if sources.chosen.takes_all else 1
    for start in range(0, len(unit.files), together):
        names = unit.files[start : start + together]
        files = [fetch(name, scratch) if is_url(name) else Path(name) for name in names]
        source = sources.source_of(names[0], files[0])
        wanted = filters.of(source)
        options = {**sources.settings, "language": wanted.language}
        with named(files[0]):
            encodings = (
                {file: text_encoding(file, options["encoding"], counts) for file in files}
                if source.is_text
                else {}
            )
            if None in encodings.values():
                skipped += names
            else:
                options["encodings"] = encodings
                documents = reader(source)(files, options, counts, watch)
                yield from _filtered(watch, documents, wanted, counts)
        for name, file in zip(names, files, strict=True):
            if is_url(name):
                # At once: the files of a crawl together may not fit on the disk.
                file.unlink()


def _filtered(
    watch: Watch, documents: Iterator[str], filters: Filters, counts: Counter[str]
) -> Iterator[str]:
    """Yield the documents in the language that are prose; count the others, and their bytes, by
    what they failed.
    """
    for number, text in enumerate(documents):
        size = len(text.encode())
        count(counts, "text", size)
        item = 1 << 40 | number  # never the number of a page, which is another item
        try:
            with watch.item(item):
                reason = "timeout" if item in watch.skip else _reason(text, filters)
        except ItemTimeout:
            reason = "timeout"
        count(counts, reason or "kept", size)
        if reason is None:
            yield text


def _reason(text: str, filters: Filters) -> str | None:
    """Return the name of the first filter that a document fails."""
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
    """Add a document and its bytes to a count."""
    counts[f"{name}.documents"] += 1
    counts[f"{name}.bytes"] += size
