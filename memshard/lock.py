"""One process at a time writes to a folder: a file in it says who, and a dead owner holds nothing.

A file made with O_EXCL, which is atomic on shared file systems too; locks of the kernel (flock) are
local to a host on some of them, missing on others, and outlive a dead node on NFS 3.
"""

import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from memshard.io import (
    atomic_write,
    check_folder,
    file_time,
    look_at,
    named,
    parse_json,
    partial_path,
)
from memshard.redact import without_secrets

log = logging.getLogger(__name__)

LOCK_FILE = "lock"
REFRESH_SECONDS = 5.0
"""How often an owner renews its file's time."""
STALE_SECONDS = 30.0
"""An owner on another host whose file is older is taken for dead."""
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Owner:
    """What a lock file says of its process.

    machine: what process numbers count on. started: when the process began, in clock ticks of that
    machine; None where its system does not say. token: drawn anew by every owner.
    """

    host: str
    pid: int
    since: str
    command: str
    machine: str
    started: int | None
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} ({self.command})"


class FolderHeld(ValueError):
    """Another process writes to the folder; the message names it and says what to do."""


class FolderLock:
    """The file that makes this process the folder's owner, renewed from a thread, and made anew
    where it was removed or damaged.

    lost: whether another process has taken the folder since, because this one was stopped or cut
    off for too long. The process then gets a SIGTERM, and must write nothing more.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.lost = False
        self._content = content
        self._nobodys_since: float | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lock", daemon=True)
        self._thread.start()

    def holds(self) -> bool:
        """Renew the file's time, and return whether the folder is still this process's."""
        self._renew()
        return not self.lost

    def _renew(self) -> None:
        if self._released.is_set():
            return
        try:
            content, _ = _look(self.path)
        except FileNotFoundError:  # removed by hand
            with suppress(OSError):
                _create(self.path, self._content)
            return
        except OSError:
            return  # a file system that is away for a while
        except ValueError:
            content = b""  # a link, a pipe, or of any size
        if content == self._content:
            self._nobodys_since = None
            with suppress(OSError):
                os.utime(self.path)  # the file server's time, which all hosts share
        elif other := _owner(content):
            self._lose(other)
        else:
            self._write_over_nobodys()

    def _lose(self, other: Owner) -> None:
        if not self.lost:
            self.lost = True
            log.error(
                "%s was taken over by %s while this process did not answer: it ends",
                self.path.parent,
                other,
            )
            os.kill(os.getpid(), signal.SIGTERM)

    def _write_over_nobodys(self) -> None:
        """Make the file anew once it has held no owner's name for a while: damage, or of a process
        that is about to write its name into it.
        """
        now = time.monotonic()
        if self._nobodys_since is None:
            self._nobodys_since = now
        elif now - self._nobodys_since > REFRESH_SECONDS and not self.lost:
            with suppress(OSError), atomic_write(self.path) as file:
                file.write_bytes(self._content)
                log.warning("%s was damaged by something else: it is made anew", self.path)

    def release(self) -> None:
        """Remove the file, unless another process has taken the folder."""
        self._stop_renewing()
        with suppress(OSError, ValueError):
            if _look(self.path)[0] == self._content:
                self.path.unlink()

    def remove_folder(self) -> None:
        """Release the folder by removing it with all that it holds. What cannot be removed is named
        in a warning.
        """
        self._stop_renewing()  # or the file would be made anew in the middle
        folder = self.path.parent
        try:
            # Under another name: a next owner may make the folder while this one goes.
            folder = folder.rename(partial_path(folder))
            shutil.rmtree(folder)
        except OSError as error:
            log.warning("%s is not needed any more and could not be removed: %s", folder, error)

    def _stop_renewing(self) -> None:
        self._released.set()
        self._thread.join()

    def _keep_renewing(self) -> None:
        while not self._released.wait(REFRESH_SECONDS):
            self._renew()


@contextmanager
def holding(folder: Path, otherwise: str, wait: bool = False) -> Iterator[FolderLock]:
    """Make the folder, if need be, and hold it. FolderHeld if another process has it.

    otherwise: what the user can do instead of waiting, for that message. wait: until it is free.
    The folder of an owner that is gone is taken over, with a warning: at once on the same host,
    else STALE_SECONDS after its last sign of life. A folder that was made here and is still empty
    is removed at the end.
    """
    check_folder(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            lock = _acquire(folder / LOCK_FILE, otherwise)
            break
        except FolderHeld:
            if not wait:
                raise
            time.sleep(1)
    try:
        yield lock
    finally:
        lock.release()
        if new:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _acquire(path: Path, otherwise: str) -> FolderLock:
    content = json.dumps(asdict(_this_process())).encode()
    while True:
        try:
            _create(path, content)
        except FileExistsError:
            with suppress(FileNotFoundError):  # released at this moment
                _take_over(path, otherwise)
        else:
            return FolderLock(path, content)


def _create(path: Path, content: bytes) -> None:
    """Write a new lock file. FileExistsError if there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with named(path), os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except BaseException:  # Ctrl-C, too
        path.unlink()
        raise


def _take_over(path: Path, otherwise: str) -> None:
    """Remove the file of an owner that is gone. FolderHeld if it lives."""
    content, _ = _look(path)
    owner = _owner(content)
    name = owner or "a process that left no name"
    if owner is not None and owner.machine == _machine():
        gone = not _lives(owner)
    else:
        gone = _silent(path, content, name)
    if not gone:
        raise FolderHeld(f"{path.parent} is in use by {name}: wait until it ends, or {otherwise}")
    # Of several processes that come here at once, one renames the file.
    aside = partial_path(path)
    path.rename(aside)
    if _look(aside)[0] == content:
        log.warning("%s was in use by %s, which is gone: taken over", path.parent, name)
    else:
        with suppress(FileExistsError):  # of one that was quicker: give it back
            os.link(aside, path)
    aside.unlink()


def _silent(path: Path, content: bytes, name: "Owner | str") -> bool:
    """Return whether the file is not renewed until it is STALE_SECONDS old, nor for 2 renewals."""
    _, last = _look(path)
    left = STALE_SECONDS - (file_time(path.parent) - last)
    # However old it seems: clocks jump, and some file systems take times from their hosts.
    left = max(min(left, STALE_SECONDS), 2 * REFRESH_SECONDS)
    log.warning(
        "%s is in use by %s, not on this host: waiting up to %.0f s for a sign of life",
        path.parent,
        name,
        left,
    )
    deadline = time.monotonic() + left
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if _look(path) != (content, last):
            return False
    return True


def _look(path: Path) -> tuple[bytes, float]:
    """Return the file's content and time. ValueError for what no owner has written."""
    if path.is_symlink():  # one that leads nowhere could be neither made nor read, without end
        raise ValueError(f"{path} is a link: remove it")
    try:
        return look_at(path, _MOST_BYTES)
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}: remove it") from error


def _this_process() -> Owner:
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=_command(),
        machine=_machine(),
        started=_start_time(os.getpid()),
        token=secrets.token_hex(8),
    )


def _command() -> str:
    """Return the command line as others may read it."""
    words = [re.sub("pipe:.*", "pipe:...", word, flags=re.DOTALL) for word in sys.argv[1:]]
    return without_secrets(shlex.join(["memshard", *words]))


def _owner(content: bytes) -> Owner | None:
    """Return what a lock file says; None if it was cut short, or is no owner's."""
    try:
        owner = Owner(**parse_json(content))
    except (ValueError, TypeError):
        return None
    return owner if type(owner.pid) is int and 0 < owner.pid < 1 << 31 else None


def _machine() -> str:
    """Return a name for what process numbers count on: this boot of this kernel, and the container;
    of hosts, names may be the same.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _lives(owner: Owner) -> bool:
    """Return whether the owner, of this machine, is still running."""
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    # Process numbers are used again; the time of the start tells two apart.
    return _start_time(owner.pid) in (owner.started, None)


def _start_time(pid: int) -> int | None:
    """Return when a process began, in clock ticks since the boot; -1 if it has ended and its parent
    has not looked yet, None where the system does not say or does not let this user see.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in parentheses, which may contain anything.
    fields = stat.rpartition(")")[2].split()
    return -1 if fields[0] in "ZX" else int(fields[19])
