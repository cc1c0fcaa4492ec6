"""The kind of a file: by the end of its name or, where that says nothing, by its first bytes."""

import csv
import re
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from memshard.data_pipeline.fetch import first_bytes, is_url
from memshard.data_pipeline.prepare.inputs.encodings import GZIP
from memshard.data_pipeline.prepare.inputs.kinds import (
    ARCHIVE,
    ARCHIVE_BEGINS,
    MARKUP,
    MARKUP_BEGINS,
    REFUSED,
    SOURCES,
    TABLE,
    TEXT_ENDINGS,
    Source,
)

FIRST_BYTES = 1 << 16
_NAME = re.compile(r"[^\W\d][\w.-]*( [\w.-]+)*")  # of a table's column


def ends_in(name: str, endings: Iterable[str]) -> bool:
    """Tell whether a name has one of the endings, or one and .gz, in upper or lower case.

    The name in a URL is its path's, without what follows a question mark. A command's input is
    named in the middle of it.
    """
    if name.startswith("pipe:"):
        words = "|".join(map(re.escape, endings))
        return re.search(f"({words})(?![a-z0-9])", name.lower()) is not None
    if is_url(name):
        name = urlsplit(name).path
    return name.lower().removesuffix(".gz").endswith(tuple(endings))


def named_kind(name: str) -> Source | None:
    """Return the source whose ending a file or URL has, or None."""
    for source in SOURCES.values():
        if source.choice is None and ends_in(name, source.endings + source.named):
            return source
    return None


def kind_of(name: str, local: Path | None = None) -> Source | None:
    """Return the source that reads a file or URL, or None if it is plain text.

    local: the copy of a URL, if there is one. Raises ValueError for what no source reads.
    """
    if source := named_kind(name):
        return source
    # A command that names a script or a text may print anything.
    if not name.startswith("pipe:"):
        if ends_in(name, TEXT_ENDINGS):
            return None
        for endings, advice in REFUSED.items():
            if ends_in(name, endings):
                raise ValueError(f"{name} is {advice}")
    if local is None and is_url(name):
        return begun(name, _fetched_bytes(name))
    with (local or Path(name)).open("rb") as stream:
        return begun(name, stream.read(FIRST_BYTES))


def begun(name: str, content: bytes) -> Source | None:
    """Return the source of a file that begins with these bytes."""
    if content.startswith(GZIP):
        try:
            content = zlib.decompressobj(wbits=31).decompress(content, FIRST_BYTES)
        except zlib.error:
            return None  # what reads the whole file names the damage
    for source in SOURCES.values():
        if source.begins is not None and source.begins.match(content):
            return source
    if content.startswith(ARCHIVE_BEGINS):
        raise ValueError(f"{name} is {ARCHIVE}")
    if MARKUP_BEGINS.match(content):
        raise ValueError(f"{name} is {MARKUP}")
    if _is_table(content.decode(errors="replace"), len(content) >= FIRST_BYTES):
        raise ValueError(f"{name} is {TABLE}")
    return None


def _is_table(text: str, cut: bool) -> bool:
    """Tell whether lines are those of a table: as many fields in each, and names of columns in the
    first, or three rows without spaces behind the commas. cut: the last row is not whole.
    """
    for delimiter in ",;\t":
        rows: list[list[str]] = []
        reader = csv.reader(text.splitlines(), delimiter=delimiter)
        for row in filter(None, reader):
            if len(row) != len(rows[0] if rows else row) or len(row) < 2:
                if not (cut and next(reader, None) is None):
                    rows = []
                break  # at once: most texts differ in their first lines
            rows.append(row)
        named = bool(rows) and all(map(_NAME.fullmatch, rows[0]))
        tight = all(row[0] and not any(field[:1].isspace() for field in row) for row in rows)
        if (named and (len(rows) > 1 or cut)) or (tight and len(rows) > 2):
            return True
    return False


@cache
def _fetched_bytes(url: str) -> bytes:
    # Asked for every purpose that depends on the kind; the answer costs a connection.
    return first_bytes(url, FIRST_BYTES)
