"""From source names to input files, and from text files (plain, jsonl, WikiExtractor output, each
also gzipped) to documents.
"""

import gzip
import html
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from itertools import zip_longest
from pathlib import Path
from typing import Literal, TextIO, cast

from memshard.data_pipeline.fetch import is_url

DocumentKind = Literal["auto", "file", "line", "wikiextractor", "pairs"]
PAIR = "\x1e"  # between the sentences of a pair, until they are tokens

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py", ".jsonl", ".warc")
EXCLUDED_FOLDERS = ("site-packages", "dist-packages")
# Characters; longer documents are cut, so that one big file still spreads over lanes and splits.
MAX_DOCUMENT = 65_536
READ_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Sources:
    """Where documents come from, paths or URLs, and how text files are cut into them."""

    files: tuple[Path | str, ...]
    documents: DocumentKind = "auto"
    text_key: str = "text"


def find_files(
    sources: Iterable[str | os.PathLike[str]],
    suffixes: Iterable[str] = TEXT_SUFFIXES,
    exclude: Iterable[str] = EXCLUDED_FOLDERS,
    prefix: str = "",
) -> tuple[Path | str, ...]:
    """The inputs behind `sources`, each once: files and URLs as named, globs and directories
    (recursively) in sorted order, and those in list files (*.paths, *.paths.gz: one a line,
    `prefix` before each).

    In directories only files with one of `suffixes` (or that and .gz) count; hidden folders and
    those named in `exclude` are left out. Raises FileNotFoundError for a missing source, ValueError
    for a directory without such files.
    """
    endings = tuple("." + suffix.lstrip(".") for suffix in suffixes)
    excluded = set(exclude)
    found: dict[Path | str, Path | str] = {}
    for name in _listed(map(str, sources), prefix):
        source = Path(name)
        if is_url(name):
            found.setdefault(name, name)
            continue
        if source.is_dir():
            files = [
                file
                for file in _walk(source, excluded)
                if file.name.removesuffix(".gz").endswith(endings)
            ]
            if not files:
                raise ValueError(
                    f"{source} holds no file ending in {' '.join(endings)} (or with .gz): name "
                    "other endings with --suffix"
                )
        elif source.exists():
            files = [source]
        elif files := [
            Path(match) for match in sorted(glob(name, recursive=True)) if Path(match).is_file()
        ]:
            pass
        else:
            raise FileNotFoundError(
                f"{source}: no such file or folder; check the path of the source"
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return tuple(found.values())


def is_warc(name: Path | str) -> bool:
    """Whether an input is a web archive, by its name; a command's is in the command."""
    return (
        ".warc" in str(name)
        if str(name).startswith("pipe:")
        else str(name).removesuffix(".gz").endswith(".warc")
    )


def _listed(sources: Iterable[str], prefix: str) -> Iterator[str]:
    for name in sources:
        if is_url(name) or not name.removesuffix(".gz").endswith(".paths"):
            yield name
            continue
        with _open(Path(name)) as stream:
            yield from (prefix + line.strip() for line in stream if line.strip())


def _walk(folder: Path, excluded: set[str]) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name not in excluded and not name.startswith(".")
        )
        yield from (Path(root, name) for name in sorted(files))


def is_utf8(file: Path) -> bool:
    """Whether a whole file is UTF-8 text; reads it in pieces."""
    try:
        with _open(file) as stream:
            while stream.read(READ_CHARACTERS):
                pass
    except UnicodeDecodeError:
        return False
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{file} is a damaged gzip file ({error}): fetch it again or leave it out"
        ) from error
    return True


def read_documents(file: Path, sources: Sources, counts: Counter[str]) -> Iterator[str]:
    """Documents of one UTF-8 file, none longer than MAX_DOCUMENT characters.

    Counts `empty` documents, which are left out, and `cut` ones, which give several. Holds a
    bounded piece of the file.
    """
    with _open(file) as stream:
        for document in _split(file, stream, sources):
            parts = 0
            for part in _cut(document):
                if not _is_valid(part):
                    counts["invalid"] += 1
                elif part.strip():
                    yield part
                else:
                    counts["empty"] += 1
                parts += 1
            counts["empty"] += parts == 0
            counts["cut"] += parts > 1


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, or one with gzip (.gz), without the white space around them."""
    with _open(file) as stream:
        return [line.strip() for line in stream]


def read_pairs(source: Path, target: Path, counts: Counter[str]) -> Iterator[str]:
    """Line n of both files, with PAIR between. ValueError if one has more lines. Counts `empty`
    pairs, those with an empty side.
    """
    with _open(source) as left, _open(target) as right:
        for number, (one, other) in enumerate(zip_longest(left, right), 1):
            if one is None or other is None:
                short, long = (source, target) if one is None else (target, source)
                raise ValueError(
                    f"{short} ends at line {number - 1} and {long} goes on: pairs need as many "
                    "lines in both files"
                )
            sides = [line.strip().replace(PAIR, " ") for line in (one, other)]
            if all(sides):
                yield PAIR.join(sides)
            else:
                counts["empty"] += 1


def _split(file: Path, stream: TextIO, sources: Sources) -> Iterator[TextIO]:
    kind = sources.documents
    if file.name.removesuffix(".gz").endswith(".jsonl"):
        yield from map(io.StringIO, _jsonl_texts(file, stream, sources.text_key))
        return
    if kind == "line":
        yield from (io.StringIO(line.rstrip("\r\n")) for line in stream)
        return
    if kind in ("auto", "wikiextractor"):
        is_wiki = stream.read(5) == "<doc "
        if is_wiki:
            yield from map(io.StringIO, _wiki_articles(stream))
            return
        if kind == "wikiextractor":
            raise ValueError(
                f"{file} does not begin with '<doc ' as WikiExtractor output does: use "
                "--documents auto, file or line"
            )
        stream.seek(0)
    yield stream


def _jsonl_texts(file: Path, stream: TextIO, key: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{file}, line {number} is not JSON ({error}): correct the line or leave the file "
                "out"
            ) from error
        if not isinstance(record, dict) or key not in record:
            keys = (
                ", ".join(map(str, record))
                if isinstance(record, dict)
                else f"a {type(record).__name__} instead of an object"
            )
            raise ValueError(
                f"{file}, line {number} has no key {key!r} (it has: {keys}): name the text's key "
                "with --text-key"
            )
        if not isinstance(record[key], str):
            kind = type(record[key]).__name__
            raise ValueError(
                f"{file}, line {number}: {key!r} is no text but {kind}: name the text's key with "
                "--text-key"
            )
        yield record[key]


def _wiki_articles(stream: TextIO) -> Iterator[str]:
    """Texts between <doc ... title="..."> and </doc>; an article whose text only repeats its title
    is empty.
    """
    tag = stream.readline()
    lines: list[str] = []
    for line in stream:
        if line.startswith("<doc "):
            tag, lines = line, []
        elif line.rstrip() == "</doc>":
            yield _wiki_text(tag, lines)
            lines = []
        else:
            lines.append(line)
    if lines:  # the last article of a file that was cut
        yield _wiki_text(tag, lines)


def _wiki_text(tag: str, lines: list[str]) -> str:
    text = "".join(lines).strip()
    title = re.search(r'title="(.*)">', tag)
    return (
        ""
        if not text or (title and html.unescape(text) == html.unescape(title[1]))
        else text + "\n"
    )


def _cut(document: TextIO) -> Iterator[str]:
    """Pieces of at most MAX_DOCUMENT characters, cut after a line end where there is one."""
    text = document.read(MAX_DOCUMENT + 1)
    while len(text) > MAX_DOCUMENT:
        end = text.rfind("\n", 0, MAX_DOCUMENT) + 1 or MAX_DOCUMENT
        yield text[:end]
        text = text[end:] + document.read(MAX_DOCUMENT + 1 - len(text) + end)
    if text:
        yield text


def _is_valid(text: str) -> bool:
    """False for half a surrogate pair, which JSON escapes can spell but UTF-8 cannot write."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _open(file: Path) -> TextIO:
    """A text stream that keeps line ends as they are and drops a byte order mark."""
    if file.name.endswith(".gz"):
        return cast(TextIO, gzip.open(file, "rt", encoding="utf-8-sig", newline="\n"))
    return file.open(encoding="utf-8-sig", newline="\n")
