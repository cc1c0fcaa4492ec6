"""The kind of a file: by the end of its name or, where that says nothing, by its first bytes."""

import re
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from memshard.data_pipeline.fetch import first_bytes, is_url
from memshard.data_pipeline.prepare.inputs.kinds import (
    ARCHIVE,
    ARCHIVE_BEGINS,
    REFUSED,
    SOURCES,
    TEXT_ENDINGS,
    Source,
)

GZIP = b"\x1f\x8b"
FIRST_BYTES = 4096


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
        return _begun(name, _fetched_bytes(name))
    with (local or Path(name)).open("rb") as stream:
        return _begun(name, stream.read(FIRST_BYTES))


def _begun(name: str, content: bytes) -> Source | None:
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
    return None


@cache
def _fetched_bytes(url: str) -> bytes:
    # Asked for every purpose that depends on the kind; the answer costs a connection.
    return first_bytes(url, FIRST_BYTES)
