"""From the names on the command line to input files and their kinds."""

import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from memshard.data_pipeline.fetch import Allowed, check_allowed, fetch, is_url
from memshard.data_pipeline.prepare.inputs.encodings import LONGEST_LINE, open_text
from memshard.data_pipeline.prepare.inputs.kind_of_file import ends_in, kind_of, named_kind
from memshard.data_pipeline.prepare.inputs.kinds import (
    DEFAULTS,
    EXCLUDED_FOLDERS,
    MAX_DOCUMENT,
    SOURCES,
    TEXT_ENDINGS,
    Source,
)


@dataclass(frozen=True)
class Sources:
    """Files or URLs that documents come from. documents: the source for files that neither name nor
    content give to another. options: values of sources' options by name, where they are not the
    default. passed_over: files in folders that are no input, by ending. longest: characters of a
    document; longer ones are cut.
    """

    files: tuple[Path | str, ...]
    documents: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    passed_over: Mapping[str, int] = field(default_factory=dict)
    longest: int = MAX_DOCUMENT

    @property
    def chosen(self) -> Source:
        """The source that `documents` names."""
        return SOURCES[self.documents]

    @property
    def web(self) -> bool:
        """True if any file is raw text of the web."""
        return any(self.source_of(file).web for file in self.files)

    @property
    def settings(self) -> dict[str, Any]:
        """Values of all sources' options, and `longest`."""
        return {**DEFAULTS, **self.options, "longest": self.longest}

    def source_of(self, file: Path | str, local: Path | None = None) -> Source:
        """Return the source that reads a file. local: the copy of a URL, if there is one.

        Raises ValueError for a file that no source reads, unless `documents` says what it is.
        """
        if self.chosen.takes_all:
            return self.chosen
        kind = kind_of(str(file), local) if self.documents == "auto" else named_kind(str(file))
        return kind or self.chosen


def find_files(
    sources: Iterable[str | os.PathLike[str]],
    suffixes: Iterable[str] = TEXT_ENDINGS,
    exclude: Iterable[str] = EXCLUDED_FOLDERS,
    prefix: str = "",
    passed_over: Counter[str] | None = None,
    allow: Allowed | None = None,
) -> tuple[Path | str, ...]:
    """Return the inputs behind `sources`, each once: files and URLs as named, globs and folders
    (recursively, links followed) in sorted order, and those in list files and URLs (*.paths,
    *.paths.gz: one a line, `prefix` before each).

    In folders only files with one of `suffixes` (or that and .gz) count; hidden folders and those
    named in `exclude` are left out. passed_over: counts the other files of folders by ending, and
    what else is left out.
    allow: what lists may name besides local files and, if `prefix` is a URL, files of its host.
    Raises FileNotFoundError for a missing source, ValueError for a folder without such files and
    for what is no file.
    """
    endings = tuple("." + suffix.lstrip(".").lower() for suffix in suffixes)
    others: Counter[str] = Counter() if passed_over is None else passed_over
    excluded = set(exclude)
    by_path: dict[Path | str, Path | str] = {}
    for name in _listed(map(str, sources), prefix, allow):
        source = Path(name)
        if is_url(name):
            if os.path.lexists(name):
                raise ValueError(
                    f"{name} is both a command and a file here: write ./{name} for the file"
                )
            by_path.setdefault(name, name)
            continue
        if source.is_dir():
            files = []
            for file in _walk(source, excluded, others):
                if file.is_file() and ends_in(file.name, endings):
                    files.append(file)
                else:
                    others[_ending(file)] += 1
            if not files:
                raise ValueError(
                    f"{source} holds no file ending in {' '.join(endings)} (or with .gz), but "
                    f"{count_endings(others) or 'nothing'}: name other endings with --suffix, or "
                    "the files, e.g. FOLDER/*"
                )
        elif source.exists():
            if not source.is_file():
                raise ValueError(
                    f"{source} is no regular file, and sources are read more than once: write "
                    "what prints it as pipe:COMMAND, or put it into a file"
                )
            files = [source]
        else:
            matches = [Path(match) for match in sorted(glob(name, recursive=True))]
            files = [match for match in matches if match.is_file()]
            # Folders are what a pattern's `**` is to look into.
            others.update(
                _ending(match) for match in matches if not (match.is_file() or match.is_dir())
            )
            if not files:
                raise FileNotFoundError(
                    f"{source}: no such file or folder; check the path of the source"
                )
        for file in files:
            # By its resolved path: a file named twice, or by a link, is read once.
            # Absolute, where a file is called pipe:COMMAND: names are passed on as text.
            real = file.resolve()
            if real in by_path:
                others["named twice"] += 1
            by_path.setdefault(real, file.absolute() if is_url(str(file)) else file)
    return tuple(by_path.values())


def count_endings(passed_over: Mapping[str, int]) -> str:
    """Return the most frequent endings of files that are passed over, as text."""
    most = Counter(passed_over).most_common(5)
    rest = sum(passed_over.values()) - sum(number for _, number in most)
    counts = [f"{number:,} {ending}" for ending, number in most]
    return ", ".join([*counts, f"{rest:,} others"] if rest else counts)


def reader(source: Source) -> Callable[..., Iterator[str]]:
    """Return a source's function that reads files, described at `Source.read`."""
    module, _, function = source.read.partition(":")
    read: Callable[..., Iterator[str]] = getattr(import_module(module), function)
    return read


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file, without the white space around them. ValueError if it has
    more than LONGEST_LINE characters.
    """
    with open_text(file) as stream:
        text = stream.read(LONGEST_LINE + 1)
    if len(text) > LONGEST_LINE:
        raise ValueError(f"{file} has more than {LONGEST_LINE:,} characters: it is no list")
    return [line.strip() for line in io.StringIO(text)]


def _listed(sources: Iterable[str], prefix: str, allow: Allowed | None) -> Iterator[str]:
    """Yield the sources, and in place of each list the lines of it."""
    for name in sources:
        if not ends_in(name, (".paths",)) or name.startswith("pipe:"):
            yield name
            continue
        if not is_url(name) and Path(name).exists() and not Path(name).is_file():
            raise ValueError(f"{name} is no regular file: put the list into one")
        with tempfile.TemporaryDirectory() as scratch:
            lines = read_lines(fetch(name, Path(scratch)) if is_url(name) else Path(name))
        for line in filter(None, lines):
            if not _on_host_of(prefix, prefix + line):
                check_allowed(prefix + line, f"a line of {name}", allow)
            yield prefix + line


def _on_host_of(prefix: str, name: str) -> bool:
    """Tell whether the prefix, which is the user's word, says where a line is fetched from."""
    # https://host and the line .evil.example/x are another host; of a command, any line is part.
    return (
        is_url(prefix)
        and not prefix.startswith("pipe:")
        and urlsplit(name).netloc == urlsplit(prefix).netloc != ""
    )


def _walk(folder: Path, excluded: set[str], passed_over: Counter[str]) -> Iterator[Path]:
    """Yield the files under a folder, also those behind links to folders, each of which is entered
    once, so that links in a circle end. Hidden and excluded folders are counted. OSError for a
    folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    entered = {folder.resolve()}
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        wanted = []
        for name in sorted(folders):
            real = Path(root, name).resolve()
            if name in excluded or name.startswith("."):
                passed_over["hidden folder" if name.startswith(".") else "excluded folder"] += 1
            elif real not in entered:
                entered.add(real)
                wanted.append(name)
        # In place, which is how os.walk learns what to enter and in which order.
        folders[:] = wanted
        yield from (Path(root, name) for name in sorted(files))


def _ending(file: Path) -> str:
    """Return what the count of files that are passed over calls this one."""
    if not file.is_file():
        return "broken link" if file.is_symlink() else "no regular file"
    if file.name.startswith("."):
        return "hidden file"
    name = file.name.lower()
    return (
        Path(name.removesuffix(".gz")).suffix + ".gz" * name.endswith(".gz") or "without an ending"
    )
