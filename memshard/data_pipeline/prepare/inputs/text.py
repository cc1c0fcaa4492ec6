"""Plain text files: a document is the file, a line, or an article of WikiExtractor's output."""

import html
import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from memshard.data_pipeline.prepare.inputs.encodings import (
    LONGEST_LINE,
    open_known,
    parts_of_lines,
)
from memshard.data_pipeline.prepare.inputs.files import reader
from memshard.data_pipeline.prepare.inputs.kind_of_file import FIRST_BYTES, begun, ends_in
from memshard.data_pipeline.prepare.inputs.kinds import Source
from memshard.data_pipeline.prepare.workers import Watch

_WIKI = "<doc "
_TITLE = 'title="'
_LINE_BYTES = 60  # of memory, beside its characters
PROSE_ENDINGS = (".txt", ".text")
log = logging.getLogger(__name__)


def read_articles_or_file(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield the articles of a file that WikiExtractor wrote; of another the whole text.

    A file whose beginning is that of objects a line is read so, whatever its name. One that holds
    something else than prose, such as a table, is left out, counted as `fault_structured_file`.
    """
    (file,) = files
    with open_known(file, options) as stream:
        begin = stream.read(FIRST_BYTES)
    if _is_wiki(begin):
        yield from read_wikiextractor(files, options, counts, watch)
        return
    try:
        if ends_in(file.name, PROSE_ENDINGS) and (source := begun(str(file), begin.encode())):
            yield from _read_as(source, files, options, counts, watch)
            return
    except ValueError as error:
        counts["fault_structured_file"] += 1
        log.warning(
            "%s; the file, or the rest of it, is left out. --documents file takes it as prose",
            error,
        )
        return
    yield from read_file(files, options, counts, watch)


def _read_as(
    source: Source,
    files: Sequence[Path],
    options: Mapping[str, Any],
    counts: Counter[str],
    watch: Watch,
) -> Iterator[str]:
    """Yield the documents of a file that is called a text and is of this source."""
    if source.web:
        raise ValueError(f"{files[0]} is a web archive: call it .warc")
    yield from reader(source)(files, options, counts, watch)


def read_file(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield the whole text of a file."""
    (file,) = files
    with open_known(file, options) as stream:
        yield from documents([stream], counts, options["longest"])


def read_each_line(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield every line of a file, cut where it is long."""
    (file,) = files
    with open_known(file, options) as stream:
        lines = (io.StringIO(line.rstrip("\r\n")) for line in parts_of_lines(stream))
        yield from documents(lines, counts, options["longest"])


def read_wikiextractor(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield every article of a file, and the text between articles. ValueError if it is not
    WikiExtractor's.
    """
    (file,) = files
    with open_known(file, options) as stream:
        if not _is_wiki(stream.read(FIRST_BYTES)):
            raise ValueError(
                f"{file} does not begin with '<doc ' as WikiExtractor output does: use "
                "--documents auto, file or line"
            )
        stream.seek(0)
        articles = map(io.StringIO, _articles(stream, counts))
        yield from documents(articles, counts, options["longest"])


def documents(streams: Iterable[TextIO], counts: Counter[str], longest: int) -> Iterator[str]:
    """Yield the documents, none longer than `longest` characters, never more than that in
    memory.

    Counts `empty` and `invalid` documents, which are left out, and `cut` ones, which give several.
    """
    for stream in streams:
        parts = 0
        for part in _cut(stream, longest):
            if not _is_valid(part):
                counts["invalid"] += 1
            elif part.strip():
                yield part
            else:
                counts["empty"] += 1
            parts += 1
        counts["empty"] += parts == 0
        counts["cut"] += parts > 1


def _cut(document: TextIO, longest: int) -> Iterator[str]:
    """Yield parts of at most `longest` characters, cut after a line end where there is one."""
    # One character more than fits shows whether the document goes on.
    text = document.read(longest + 1)
    while len(text) > longest:
        end = text.rfind("\n", 0, longest) + 1 or longest
        yield text[:end]
        text = text[end:] + document.read(longest + 1 - len(text) + end)
    if text:
        yield text


def _is_valid(text: str) -> bool:
    """Return whether a text is free of half surrogate pairs, which JSON escapes can spell but UTF-8
    cannot write.
    """
    # ASCII first, as most English text is: a flag of the string, known without a scan.
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _is_wiki(begin: str) -> bool:
    """Tell whether a file that begins so is WikiExtractor's."""
    # Not with an expression: on hostile lines its time grows with the square of their length.
    return begin.lstrip().startswith(_WIKI) or any(
        line.startswith(_WIKI) and line.endswith('">') and _TITLE in line[len(_WIKI) : -2]
        for line in begin.split("\n")
    )


def _articles(stream: TextIO, counts: Counter[str]) -> Iterator[str]:
    """Yield the texts between <doc ... title="..."> and </doc>; an article whose text only repeats
    its title is empty.

    An article without its end goes to the next one's beginning, counted as `fault_doc_without_end`,
    or to the end of the file, which was cut; one longer than LONGEST_LINE comes in parts. Text
    outside of articles is one as well, counted as `fault_text_outside_doc`.
    """
    tag, lines, size = "", list[str](), 0
    for line in chain(parts_of_lines(stream), ["</doc>"]):
        begins = line.startswith(_WIKI)
        if not begins and line.rstrip() != "</doc>":
            lines.append(line)
            size += len(line) + _LINE_BYTES
            if size > LONGEST_LINE:
                yield "".join(lines)
                lines, size = [], 0
            continue
        if tag:
            counts["fault_doc_without_end"] += begins
            yield _article(tag, lines)
        elif any(map(str.strip, lines)):
            counts["fault_text_outside_doc"] += 1
            yield "".join(lines)
        tag, lines, size = line if begins else "", [], 0


def _article(tag: str, lines: list[str]) -> str:
    text = "".join(lines).strip()
    title, closed, _ = tag.partition(_TITLE)[2].rpartition('">')
    # Unescaped on both sides: in the tag "&" and quotes may be escaped where the text
    # has them plain.
    only_title = bool(closed) and html.unescape(text) == html.unescape(title)
    return text + "\n" if text and not only_title else ""
