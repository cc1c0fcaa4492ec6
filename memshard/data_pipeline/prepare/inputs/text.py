"""Plain text files: a document is the file, a line, or an article of WikiExtractor's output."""

import html
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from memshard.data_pipeline.prepare.inputs.files import open_text
from memshard.data_pipeline.prepare.workers import Watch

_WIKI = "<doc "


def read_articles_or_file(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield the articles of a file that WikiExtractor wrote; of another the whole text."""
    (file,) = files
    with open_text(file) as stream:
        is_wiki = stream.read(len(_WIKI)) == _WIKI
    read = read_wikiextractor if is_wiki else read_file
    yield from read(files, options, counts, watch)


def read_file(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield the whole text of a file."""
    (file,) = files
    with open_text(file) as stream:
        yield from documents([stream], counts, options["longest"])


def read_each_line(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield every line of a file."""
    (file,) = files
    with open_text(file) as stream:
        lines = (io.StringIO(line.rstrip("\r\n")) for line in stream)
        yield from documents(lines, counts, options["longest"])


def read_wikiextractor(
    files: Sequence[Path], options: Mapping[str, Any], counts: Counter[str], watch: Watch
) -> Iterator[str]:
    """Yield every article of a file. ValueError if it is not WikiExtractor's."""
    (file,) = files
    with open_text(file) as stream:
        if stream.read(len(_WIKI)) != _WIKI:
            raise ValueError(
                f"{file} does not begin with '<doc ' as WikiExtractor output does: use "
                "--documents auto, file or line"
            )
        yield from documents(map(io.StringIO, _articles(stream)), counts, options["longest"])


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


def _articles(stream: TextIO) -> Iterator[str]:
    """Yield the texts between <doc ... title="..."> and </doc>; an article whose text only repeats
    its title is empty. `stream` is behind the first "<doc ".
    """
    tag = stream.readline()
    lines: list[str] = []
    for line in stream:
        if line.startswith(_WIKI):
            tag, lines = line, []
        elif line.rstrip() == "</doc>":
            yield _article(tag, lines)
            lines = []
        else:
            lines.append(line)
    if lines:  # the last article of a file that was cut
        yield _article(tag, lines)


def _article(tag: str, lines: list[str]) -> str:
    text = "".join(lines).strip()
    title = re.search(r'title="(.*)">', tag)
    # Unescaped on both sides: in the tag "&" and quotes may be escaped where the text
    # has them plain.
    only_title = title is not None and html.unescape(text) == html.unescape(title[1])
    return text + "\n" if text and not only_title else ""
