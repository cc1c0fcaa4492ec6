"""Fetching files by http(s), and from s3 or anything else through a command; with retries, which
resume a transfer where it broke off.
"""

import errno
import http.client
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

from memshard.io import named

RETRIES = 5
FIRST_WAIT = 1.0  # seconds; doubles with every try
TIMEOUT = 60.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
S3_COMMAND = "aws s3 cp --quiet {url} -"  # another in MEMSHARD_S3_COMMAND, e.g. "s5cmd cat {url}"
ALLOWED = ("connections", "commands")
Allowed = Literal["connections", "commands"]
"""What names in files may do: be fetched from URLs, or also be commands that are run."""
Result = TypeVar("Result")


def is_url(name: str | os.PathLike[str]) -> bool:
    """Tell whether a name is something to fetch: http(s)://, s3://, pipe:COMMAND. A path object is
    a local file, whatever its name.
    """
    return isinstance(name, str) and name.startswith(("http://", "https://", "s3://", "pipe:"))


def needed(names: Iterable[str]) -> Allowed | None:
    """Return what must be allowed before all of these are fetched; None if all are local."""
    remote = [name for name in names if is_url(name)]
    if any(name.startswith("pipe:") for name in remote):
        return "commands"
    return "connections" if remote else None


def check_allowed(name: str, source: str, allow: Allowed | None) -> None:
    """Raise ValueError if `name` is to be fetched and that is not allowed.

    source: the file that says so, and where: what is typed on the command line needs no leave.
    """
    need = needed([name])
    if need is None or allow in (need, "commands"):
        return
    does = "runs a command" if need == "commands" else "opens a connection"
    raise ValueError(
        f"{source} is {name!r}, which {does}; what files say does so only if the command line "
        f"says --allow {need}"
    )


def fetch(url: str, folder: Path) -> Path:
    """Copy what `url` names into a file in `folder` and return its path.

    OSError after RETRIES tries, or at once if there is no room for the file.
    """
    # Without what follows a question mark, and of a command nothing: readers go by a name's ending,
    # and `zcat a.gz` prints what is no longer zipped.
    name = "" if url.startswith("pipe:") else urlsplit(url).path.rpartition("/")[2]
    target = folder / (re.sub(r"[^A-Za-z0-9._-]", "_", name)[-100:].lstrip(".-") or "fetched")
    target.unlink(missing_ok=True)
    with named(target):
        if url.startswith(("http://", "https://")):
            retry(url, lambda: _download(url, target))
        else:
            retry(url, lambda: _run(_command(url), target))
    return target


def read_range(url: str, begin: int, end: int) -> bytes:
    """Return bytes begin to end - 1 of an http(s) URL. OSError after RETRIES tries, or if the
    server sends something else.
    """

    def read() -> bytes:
        request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-{end - 1}"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            if response.status != 206:
                raise OSError(
                    f"the server does not answer range requests (status {response.status})"
                )
            content: bytes = response.read(end - begin)
        if len(content) != end - begin:
            raise OSError(f"{len(content)} bytes came instead of {end - begin}")
        return content

    return retry(url, read)


def first_bytes(url: str, size: int) -> bytes:
    """Return how what `url` names begins, at most `size` bytes. OSError after RETRIES tries."""

    def read() -> bytes:
        if url.startswith(("http://", "https://")):
            request = urllib.request.Request(url, headers={"Range": f"bytes=0-{size - 1}"})
            # A server without range requests sends everything, of which no more is read.
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                content: bytes = response.read(size)
                return content
        with subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", _command(url)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            content = process.stdout.read(size)
            # With all that it started: `cat a | sort` would go on.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return content

    return retry(url, read)


def retry(url: str, action: Callable[[], Result]) -> Result:
    """Return the result of `action`, which is tried again after failures, with doubling waits,
    unless the server says that it has no such thing.
    """
    # 5 tries wait 1 + 2 + 4 + 8 = 15 seconds.
    for attempt in range(RETRIES):
        try:
            return action()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise  # not the network's fault
            # Asking again does not help against these.
            gone = isinstance(error, urllib.error.HTTPError) and error.code in (
                400,
                401,
                403,
                404,
                410,
            )
            if gone or attempt == RETRIES - 1:
                times = "once" if attempt == 0 else f"{attempt + 1} times"
                raise OSError(
                    f"{url} could not be read, tried {times}: {error}; check the address and the "
                    "network"
                ) from error
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError


def _download(url: str, target: Path) -> None:
    done = target.stat().st_size if target.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != 206:
            done = 0
        length = response.headers.get("Content-Length")
        # A server without range requests sends everything, so the file begins anew.
        with target.open("r+b" if done else "wb") as stream:
            stream.seek(done)
            shutil.copyfileobj(response, stream, 1 << 20)
            stream.truncate()
    if length is not None and target.stat().st_size != done + int(length):
        raise OSError(f"{target.stat().st_size - done} bytes came instead of {length}")


def _command(url: str) -> str:
    if url.startswith("pipe:"):
        return url.removeprefix("pipe:")
    return os.environ.get("MEMSHARD_S3_COMMAND", S3_COMMAND).replace("{url}", shlex.quote(url))


def _run(command: str, target: Path) -> None:
    """Write the standard output of a shell command to a file. An exit code other than 0 is a
    failure, whatever came.
    """
    with target.open("wb") as stream:
        done = subprocess.run(
            # pipefail, or `curl ... | gunzip` would succeed when curl fails.
            ["bash", "-o", "pipefail", "-c", command],
            stdout=stream,
            stderr=subprocess.PIPE,
        )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(
            f"`{command}` ended with code {done.returncode}: "
            f"{lines[-1] if lines else 'it said nothing'}"
        )
