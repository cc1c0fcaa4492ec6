"""Writing files so that a reader, or the next start after a kill, never meets half of one, and
reading what others may have written.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_SMALL = 1 << 30


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give an OSError of the block the name of the file it concerns, where it has none: those of
    reads and writes do not.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync(descriptor: int) -> None:
    """Wait until what was written to an open file or folder is on the disk, where the file system
    can say so: some network and FUSE file systems cannot.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk, as `sync`."""
    with named(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary file's name next to `path`; it becomes `path` if the block succeeds and
    is removed if it raises.

    durable: also wait until the content is on the disk, so that the new name cannot outlive a power
    cut that its content does not survive.
    """
    partial = partial_path(path)
    try:
        with named(path):
            yield partial
            if durable:
                to_disk(partial)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path`; it becomes `path`, which is not there or empty, if the
    block succeeds, with all of its files on the disk, and is removed if it raises.
    """
    partial = partial_path(path)
    partial.mkdir(parents=True)
    try:
        with named(path):
            yield partial
        for file in partial.rglob("*"):
            to_disk(file)
        to_disk(partial)
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_free(folder: Path, names: Iterable[str], otherwise: str) -> None:
    """Raise ValueError if one of the names, which are about to be written, is taken in the folder.

    otherwise: what the user can do, for the message.
    """
    for name in names:
        if os.path.lexists(folder / name):
            raise ValueError(
                f"{folder / name} is there already and was not written by memshard: {otherwise}"
            )


def check_folder(path: Path) -> None:
    """Raise ValueError if what has this name is no folder, but a file or a link to nothing."""
    if os.path.lexists(path) and not path.is_dir():
        what = "a link to nothing" if not path.exists() else "a file"
        raise ValueError(f"{path} is {what}, and no folder: remove it, or name another one")


def file_time(folder: Path) -> float:
    """Return the Unix time by the clock of the folder's file server, which all of its hosts share
    and their own clocks may differ from; by this host's where nothing can be written.
    """
    probe = partial_path(folder / "clock")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return now


def is_absence(error: OSError) -> bool:
    """Tell whether an error says that a file is not there, and not that it cannot be read (no
    permission, a failing disk, a stale mount).
    """
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def read_small(path: Path, most: int = MOST_SMALL) -> bytes:
    """Return the content of a file of at most `most` bytes, by default 1 GiB. ValueError if it is
    larger, or no file: reading a pipe, or a link to /dev/zero, has no end.
    """
    return look_at(path, most)[0]


def look_at(path: Path, most: int = MOST_SMALL) -> tuple[bytes, float]:
    """Return what `read_small` does, and the file's time, of the file that was opened."""
    # Opened, since a mere stat may be answered from a network file system's cache.
    with named(path), open(path, "rb", opener=_without_waiting) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{path.name} is no file")
        if facts.st_size > most:
            raise ValueError(f"{path.name} has {facts.st_size:,} bytes")
        return file.read(), facts.st_mtime


def _without_waiting(path: str, flags: int) -> int:
    # Opening a pipe waits for somebody who writes to it.
    return os.open(path, flags | os.O_NONBLOCK)


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON text. ValueError if it is none, or nested deeper than the parser
    can go.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_lines(path: Path) -> list[Any]:
    """Return the values of a file of JSON lines without a last line that a kill cut short; none if
    there is no file. ValueError names a damaged line.
    """
    data = path.read_bytes() if path.exists() else b""
    values = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            values.append(parse_json(line))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); cut the file before this line to go "
                "on from there"
            ) from error
    return values


def partial_path(path: Path) -> Path:
    """Return a new name next to `path` for a file or folder that is not whole yet.

    Random, because process numbers of two containers that share a disk are often the same.
    """
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def is_partial(name: str, whole: str) -> bool:
    """Tell whether `partial_path` made a name, of one that the expression `whole` matches."""
    return re.fullmatch(rf"(?:{whole})\.[0-9a-f]{{8}}\.partial", name) is not None
