"""Fetching files by http(s), and from s3 or anything else through a command; with retries, which
resume a transfer where it broke off.
"""

import base64
import errno
import http.client
import math
import os
import re
import shlex
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from memshard.io import named
from memshard.redact import shown

RETRIES = 5
FIRST_WAIT = 1.0  # seconds; doubles with every try
# Seconds of silence, and for an answer to begin or a range of bytes to come. A range is given up
# after 5 x 45 + 15 of them, before other ranks stop waiting for this one (guards.timeout, 300).
TIMEOUT = 45.0
SLOWEST = 10_000  # bytes a second of a whole file, on average, after TIMEOUT
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
S3_COMMAND = "aws s3 cp --quiet {url} -"  # another in MEMSHARD_S3_COMMAND, e.g. "s5cmd cat {url}"
ALLOWED = ("connections", "commands")
Allowed = Literal["connections", "commands"]
"""What names in files may do: be fetched from URLs, or also be commands that are run."""
Result = TypeVar("Result")


class GivenUp(OSError):
    """What was tried as often as it is worth."""


class Unreachable(GivenUp):
    """What serves some data did not answer, or not with them, as often as it was tried. It may be
    well later, unlike what is missing or damaged.
    """


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
        with _answer(url, f"bytes={begin}-{end - 1}") as response:
            if response.status != 206:
                raise OSError(
                    f"the server does not answer range requests (status {response.status})"
                )
            # Before it is read, which counts it down; None if it is absent or no number.
            length = end - begin if response.length is None else response.length
            content = b"".join(_pieces(response, end - begin, slowest=math.inf))
        if len(content) != end - begin:
            # A file that ends early is damaged, which more tries do not mend.
            broken = ConnectionError if length == end - begin else OSError
            raise broken(f"{len(content)} bytes came instead of {end - begin}")
        return content

    return retry(url, read)


def first_bytes(url: str, size: int) -> bytes:
    """Return how what `url` names begins, at most `size` bytes. OSError after RETRIES tries."""

    def read() -> bytes:
        if url.startswith(("http://", "https://")):
            # A server without range requests sends everything, of which no more is read.
            with _answer(url, f"bytes=0-{size - 1}") as response:
                return b"".join(_pieces(response, size))
        with subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", _command(url)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
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

    Raises OSError: Unreachable unless it is the thing itself that is missing or cut.
    """
    # 5 tries wait 1 + 2 + 4 + 8 = 15 seconds.
    for attempt in range(RETRIES):
        try:
            return action()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, GivenUp):
                raise  # of an action that has tried often enough itself
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
                raise (Unreachable if _may_recover(error) else GivenUp)(
                    f"{shown(url)} could not be read, tried {times}: {error}; check the "
                    "address and the network"
                ) from error
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError


def _may_recover(error: Exception) -> bool:
    """Tell whether what failed so may be well later: a network, a server, a login, a command."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code not in (400, 404, 410, 416)
    return isinstance(
        error, (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
    )


def _answer(url: str, wanted: str | None = None) -> http.client.HTTPResponse:
    """Return the answer to a request, whose headers are there. wanted: range of bytes.

    TimeoutError if it has not begun after TIMEOUT.
    """
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(
        urlunsplit(parts._replace(netloc=host)), headers={"Range": wanted} if wanted else {}
    )
    if at:  # which urllib takes for a port, and says so; not passed on to where it is redirected
        basic = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {basic}")
    answer: SimpleQueue[http.client.HTTPResponse | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answer.put(urllib.request.urlopen(request, timeout=TIMEOUT))
        except urllib.error.HTTPError as error:
            error.close()
            answer.put(error)
        except Exception as error:
            answer.put(error)

    # In a thread: urlopen's timeout is one of silence, and headers may come a byte at a time.
    threading.Thread(target=ask, daemon=True).start()
    try:
        response = answer.get(timeout=TIMEOUT)
    except Empty:
        raise TimeoutError(f"no answer in {TIMEOUT:.0f} s") from None
    if isinstance(response, Exception):
        raise response.with_traceback(None)
    return response


def _pieces(
    response: http.client.HTTPResponse, size: int | None = None, slowest: float = SLOWEST
) -> Iterator[bytes]:
    """Yield what a server sends, `size` bytes or to the end. TimeoutError if it comes slower, after
    TIMEOUT, than `slowest` bytes a second.
    """
    begun, done = time.monotonic(), 0
    # read1 returns what has come; read would wait until there is a whole piece.
    while size is None or done < size:
        piece = response.read1(1 << 20 if size is None else min(size - done, 1 << 20))
        if not piece:
            return
        yield piece
        done += len(piece)
        seconds = time.monotonic() - begun
        if seconds > TIMEOUT + done / slowest and done != size:
            raise TimeoutError(f"only {done} bytes came in {seconds:.0f} s")


def _download(url: str, target: Path) -> None:
    done = target.stat().st_size if target.exists() else 0
    with _answer(url, f"bytes={done}-" if done else None) as response:
        if response.status != 206:
            done = 0
        length = response.length
        # A server without range requests sends everything, so the file begins anew.
        with target.open("r+b" if done else "wb") as stream:
            stream.seek(done)
            for piece in _pieces(response):
                stream.write(piece)
            stream.truncate()
    if length is not None and target.stat().st_size != done + length:
        raise ConnectionError(f"{target.stat().st_size - done} bytes came instead of {length}")


def _command(url: str) -> str:
    if url.startswith("pipe:"):
        return url.removeprefix("pipe:")
    return os.environ.get("MEMSHARD_S3_COMMAND", S3_COMMAND).replace("{url}", shlex.quote(url))


def _environment() -> dict[str, str]:
    """Return the variables for the user's commands: their scripts import what is beside them."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}


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
            env=_environment(),
        )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ConnectionError(
            f"the command ended with code {done.returncode}: "
            f"{lines[-1] if lines else 'it said nothing'}"
        )
