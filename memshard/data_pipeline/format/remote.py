"""Data folders at a URL: a local copy of the small files, and a cache of limited size for blocks of
shards.

http(s) folders are read by range requests, so that a rank fetches only what it needs; files of s3
and pipe: folders are fetched whole. A pipe: folder is a command with {file} in place of the file's
name. MEMSHARD_CACHE names the cache's folder (default ~/.cache/memshard), MEMSHARD_CACHE_BYTES its
limit (default 64 GiB).
"""

import hashlib
import logging
import os
import stat
import tempfile
from collections import OrderedDict
from pathlib import Path

from memshard.data_pipeline.fetch import DISK_FULL, fetch, is_url, read_range, retry
from memshard.io import atomic_write, check_folder
from memshard.variables import read_number

log = logging.getLogger(__name__)
BLOCK_BYTES = 1 << 22
DEFAULT_LIMIT = 64 << 30
BLOCKS_IN_MEMORY = 8  # of those that were fetched last
OPEN_BLOCKS = 128  # files: all that sequences are shuffled over at a time


def local_copy(path: str | os.PathLike[str], name: str, sha256: str | None = None) -> Path:
    """Return the path of the file `name` of a data folder; of a URL, that of a local copy, fetched
    if it is absent or, given a hash, different.
    """
    if not is_url(path):
        return Path(path) / name
    folder = cache_folder(str(path))
    target = folder / name
    if (
        sha256 is not None
        and target.exists()
        and hashlib.sha256(target.read_bytes()).hexdigest() == sha256
    ):
        return target

    def copy() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            file = fetch(file_url(str(path), name), Path(scratch))
            if sha256 is not None and hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
                raise OSError(f"{name} has another content than index.json says")
            # Atomic, so that ranks that fetch the same file at once leave a whole one.
            file.replace(target)

    retry(str(path), copy)
    return target


def cache_folder(url: str) -> Path:
    """Return the folder for local copies of files of the data folder at `url`; it exists.
    ValueError if others than the user, root or the folder's group can write to the cache.
    """
    root = Path(os.environ.get("MEMSHARD_CACHE") or Path.home() / ".cache" / "memshard")
    # Ours alone: what another user put there would be trained on. One that exists may be shared
    # with a group.
    root.parent.mkdir(parents=True, exist_ok=True)
    check_folder(root)
    root.mkdir(mode=0o700, exist_ok=True)
    facts = root.stat()
    if facts.st_uid not in (os.geteuid(), 0) or facts.st_mode & stat.S_IWOTH:
        raise ValueError(
            f"the cache {root} belongs to another user, or everybody can write to it: what they "
            "put there would be trained on; name a folder of your own in MEMSHARD_CACHE"
        )
    folder = root / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


def file_url(url: str, name: str) -> str:
    """Return the URL of a file in the data folder at `url`."""
    return url.replace("{file}", name) if url.startswith("pipe:") else f"{url.rstrip('/')}/{name}"


class BlockCache:
    """Byte ranges of the shards at `url`. When the blocks on disk pass the limit, those least
    recently used are removed, whichever process wrote them.
    """

    def __init__(self, url: str, limit: int | None = None) -> None:
        self._url = url
        self._ranges = url.startswith(("http://", "https://"))
        self._folder = cache_folder(url) / "blocks"
        self._folder.mkdir(exist_ok=True)
        if limit is None:
            limit = read_number(os.environ, "MEMSHARD_CACHE_BYTES", str(DEFAULT_LIMIT))
        self._limit = limit
        self._written = self._limit  # look at the folder before the first block is added
        self._full = False
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, sha256: str, size: int, begin: int, end: int) -> bytes:
        """Return bytes begin to end - 1 of the file `name`, which has `size` bytes and this hash.
        OSError if they cannot be fetched.
        """
        step = self._step(size)
        parts = []
        for number in self._numbers(size, begin, end):
            first = number * step
            last = min(first + step, size)
            within = max(begin - first, 0), min(end, last) - first
            key = _key(name, sha256, number)
            part = self._kept_part(key, last - first, *within)
            if part is None:
                part = self._fetched(key, name, first, last)[slice(*within)]
            parts.append(part)
        return b"".join(parts)

    def drop(self, name: str, sha256: str, size: int, begin: int, end: int) -> None:
        """Forget what `read` with the same arguments read, so that it is fetched again."""
        for number in self._numbers(size, begin, end):
            key = _key(name, sha256, number)
            self._memory.pop(key, None)
            if key in self._open:
                os.close(self._open.pop(key))
            (self._folder / key).unlink(missing_ok=True)

    def _step(self, size: int) -> int:
        return BLOCK_BYTES if self._ranges else size

    def _numbers(self, size: int, begin: int, end: int) -> range:
        """Return the numbers of the blocks that hold bytes begin to end - 1."""
        step = self._step(size)
        return range(begin // step, -(-end // step))

    def _kept_part(self, key: str, size: int, begin: int, end: int) -> bytes | None:
        """Return bytes begin to end - 1 of a block of `size` bytes, or None if it is not here."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key][begin:end]
        # Only the part: rows of a shuffled order come from a hundred blocks in turn.
        if key not in self._open:
            try:
                descriptor = os.open(self._folder / key, os.O_RDONLY)
            except FileNotFoundError:
                return None
            self._open[key] = descriptor
            if os.fstat(descriptor).st_size != size:
                os.close(self._open.pop(key))
                return None  # cut by a full disk
        self._open.move_to_end(key)
        while len(self._open) > OPEN_BLOCKS:
            os.close(self._open.popitem(last=False)[1])
        # The time of modification serves as that of the last use; many file systems do not record
        # reads.
        os.utime(self._open[key])
        part = os.pread(self._open[key], end - begin, begin)
        return part if len(part) == end - begin else None

    def _fetched(self, key: str, name: str, begin: int, end: int) -> bytes:
        """Fetch a block, bytes begin to end - 1 of the file `name`, and keep it."""
        content = self._fetch(name, begin, end)
        self._keep(self._folder / key, content)
        if key in self._open:
            os.close(self._open.pop(key))  # of the file that was there before
        self._memory[key] = content
        while len(self._memory) > (BLOCKS_IN_MEMORY if self._ranges else 1):
            self._memory.popitem(last=False)
        return content

    def __getstate__(self) -> dict:
        """Leave out open files: each worker process opens its own."""
        return {**vars(self), "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in vars(self).get("_open", {}).values():
            os.close(descriptor)

    def _keep(self, file: Path, content: bytes) -> None:
        """Write a block to the cache, which a full disk ends: blocks are then fetched again."""
        if self._full:
            return
        try:
            with atomic_write(file) as partial:
                partial.write_bytes(content)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self._full = True
            log.warning(
                "the cache is full (%s) and gets no more blocks, which are fetched whenever they "
                "are read: name a larger disk in MEMSHARD_CACHE, or set MEMSHARD_CACHE_BYTES",
                error,
            )
        else:
            self._make_room(len(content))

    def _fetch(self, name: str, begin: int, end: int) -> bytes:
        url = file_url(self._url, name)
        if self._ranges:
            return read_range(url, begin, end)

        def whole() -> bytes:
            with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
                content = fetch(url, Path(scratch)).read_bytes()
            if len(content) != end:
                raise OSError(f"{len(content)} bytes came instead of {end}")
            return content

        return retry(url, whole)

    def _make_room(self, added: int) -> None:
        """Count bytes just written, and remove blocks if the limit is passed."""
        self._written += added
        if self._written <= self._limit:
            return
        files = []
        for file in self._folder.iterdir():
            try:
                facts = file.stat()
            except FileNotFoundError:
                continue  # another process was quicker
            if file.is_file():
                files.append((facts.st_mtime_ns, facts.st_size, file))
        total = sum(size for _, size, _ in files)
        oldest_first = sorted(files, key=lambda item: item[0])
        for _, size, file in oldest_first[:-1]:  # never the newest, which was just read
            if total <= self._limit:
                break
            file.unlink(missing_ok=True)
            total -= size
        self._written = total


def _key(name: str, sha256: str, number: int) -> str:
    """Return the name of a block in the cache. With the file's hash, or blocks of a data set that
    was built anew at the same URL would pass for those of the new one.
    """
    return f"{name}.{sha256[:16]}.{number}"
