"""From the names on the command line to input files and their kinds, and text files opened."""

import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO, cast

from memshard.data_pipeline.fetch import is_url
from memshard.data_pipeline.prepare.inputs.kinds import (
    DEFAULTS,
    EXCLUDED_FOLDERS,
    SOURCES,
    TEXT_ENDINGS,
    Source,
)

READ_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Sources:
    """Files or URLs that documents come from. documents: the source for files whose ending no
    other one claims. options: values of sources' options by name, where they are not the default.
    """

    files: tuple[Path | str, ...]
    documents: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

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
        """Values of all sources' options."""
        return {**DEFAULTS, **self.options}

    def source_of(self, file: Path | str) -> Source:
        """Return the source that reads a file."""
        if not self.chosen.takes_all:
            for source in SOURCES.values():
                if source.choice is None and _ends_in(str(file), source.endings):
                    return source
        return self.chosen


def find_files(
    sources: Iterable[str | os.PathLike[str]],
    suffixes: Iterable[str] = TEXT_ENDINGS,
    exclude: Iterable[str] = EXCLUDED_FOLDERS,
    prefix: str = "",
) -> tuple[Path | str, ...]:
    """Return the inputs behind `sources`, each once: files and URLs as named, globs and folders
    (recursively) in sorted order, and those in list files (*.paths, *.paths.gz: one a line,
    `prefix` before each).

    In folders only files with one of `suffixes` (or that and .gz) count; hidden folders and those
    named in `exclude` are left out. Raises FileNotFoundError for a missing source, ValueError for a
    folder without such files.
    """
    endings = tuple("." + suffix.lstrip(".") for suffix in suffixes)
    excluded = set(exclude)
    by_path: dict[Path | str, Path | str] = {}
    for name in _listed(map(str, sources), prefix):
        source = Path(name)
        if is_url(name):
            by_path.setdefault(name, name)
            continue
        if source.is_dir():
            files = [file for file in _walk(source, excluded) if _ends_in(file.name, endings)]
            if not files:
                raise ValueError(
                    f"{source} holds no file ending in {' '.join(endings)} (or with .gz): name "
                    "other endings with --suffix"
                )
        elif source.exists():
            files = [source]
        else:
            matches = (Path(match) for match in sorted(glob(name, recursive=True)))
            files = [match for match in matches if match.is_file()]
            if not files:
                raise FileNotFoundError(
                    f"{source}: no such file or folder; check the path of the source"
                )
        for file in files:
            # By its resolved path: a file named twice, or by a link, is read once.
            by_path.setdefault(file.resolve(), file)
    return tuple(by_path.values())


def reader(source: Source) -> Callable[..., Iterator[str]]:
    """Return a source's function that reads files, described at `Source.read`."""
    module, _, function = source.read.partition(":")
    read: Callable[..., Iterator[str]] = getattr(import_module(module), function)
    return read


def open_text(file: Path) -> TextIO:
    """Open a UTF-8 text file, also one with gzip (.gz). Line ends stay as they are; a byte order
    mark is dropped.
    """
    # "\n" alone ends a line: by default a lone "\r" would, and both would be changed into "\n".
    if file.name.endswith(".gz"):
        return cast(TextIO, gzip.open(file, "rt", encoding="utf-8-sig", newline="\n"))
    return file.open(encoding="utf-8-sig", newline="\n")


def is_utf8(file: Path) -> bool:
    """Return whether a whole file is UTF-8 text. ValueError for a damaged gzip file."""
    try:
        with open_text(file) as stream:
            while stream.read(READ_CHARACTERS):
                pass
    except UnicodeDecodeError:
        return False
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{file} is a damaged gzip file ({error}): fetch it again or leave it out"
        ) from error
    return True


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file, without the white space around them."""
    with open_text(file) as stream:
        return [line.strip() for line in stream]


def _ends_in(name: str, endings: tuple[str, ...]) -> bool:
    """Tell whether a name has one of the endings, or one and .gz. A command's input is named in the
    middle of it.
    """
    if name.startswith("pipe:"):
        return any(ending in name for ending in endings)
    return name.removesuffix(".gz").endswith(endings)


def _listed(sources: Iterable[str], prefix: str) -> Iterator[str]:
    for name in sources:
        # Lists are local files; a URL is always a source.
        if is_url(name) or not _ends_in(name, (".paths",)):
            yield name
            continue
        with open_text(Path(name)) as stream:
            yield from (prefix + line.strip() for line in stream if line.strip())


def _walk(folder: Path, excluded: set[str]) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        # In place, which is how os.walk learns what to enter and in which order.
        folders[:] = sorted(
            name for name in folders if name not in excluded and not name.startswith(".")
        )
        yield from (Path(root, name) for name in sorted(files))
