"""Tasks in worker processes. A worker that hangs on an item, or dies of it, is started again
without that item.
"""

import json
import math
import multiprocessing
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tqdm import tqdm

NO_ITEM = -1
# Times an item's seconds, on the clock, before its process is killed: it sleeps, or hangs where no
# signal gets through.
GRACE = 10
# Bytes of memory of a process that works apart; a page of 1.5 MB takes 0.2 GB.
MOST_MEMORY = 1 << 32
TEXTS_A_COPY = 100


class ItemTimeout(BaseException):
    """An item took too long. A BaseException, because libraries catch every Exception."""


@dataclass
class Watch:
    """A task's items: which one it works on, since when, and which to leave out because they killed
    a worker before.

    seconds: CPU time that an item may take. state: (item, time of its start), in a worker shared
    with the parent. parent: its process number.
    """

    seconds: float | None = None
    skip: frozenset[int] = frozenset()
    state: Any = field(default_factory=lambda: [float(NO_ITEM), 0.0])
    parent: int | None = None

    @contextmanager
    def item(self, number: int) -> Iterator[None]:
        """Work on an item. Raises ItemTimeout after `seconds` of CPU time, a clock that does not
        depend on other work on the machine.
        """
        if self.parent is not None and os.getppid() != self.parent:
            os._exit(1)  # the build was killed: do not interfere with the one that resumes it
        # The time first, so that the parent never takes an older item's start for this one's.
        self.state[1] = time.monotonic()
        self.state[0] = float(number)
        if self.seconds:
            signal.setitimer(signal.ITIMER_PROF, self.seconds)
        try:
            yield
        finally:
            if self.seconds:
                signal.setitimer(signal.ITIMER_PROF, 0)
            self.state[0] = float(NO_ITEM)


class Apart:
    """Computes `function(text)`, a value of JSON, in a copy of this process that is killed after
    `seconds` of CPU time a text (rounded up), in C code too, and has at most MOST_MEMORY.

    A copy works on TEXTS_A_COPY texts: to fork takes 25 ms, as long as most pages.
    """

    def __init__(self, function: Callable[[str], Any], seconds: float) -> None:
        self._function, self._seconds = function, seconds
        self._child: int | None = None
        self._left = 0

    def __call__(self, text: str) -> Any:
        """Return the function's value of a text. Raises ItemTimeout if the copy was killed, as
        after its time, and RuntimeError for every exception.
        """
        if not self._left:
            self.close()
            self._start()
        self._left -= 1
        try:
            self._connection.send_bytes(text.encode("utf-8", "surrogatepass"))
            answer = self._connection.recv_bytes()
        except (EOFError, OSError):
            raise ItemTimeout if os.WIFSIGNALED(self.close()) else _failed() from None
        except BaseException:
            self.close()  # or the next text would get this one's answer
            raise
        if not answer:
            self.close()
            raise _failed()
        return json.loads(answer)

    def close(self) -> int:
        """End the copy, if there is one; return its status."""
        if self._child is None:
            return 0
        self._connection.close()
        child, self._child, self._left = self._child, None, 0
        os.kill(child, signal.SIGKILL)  # it may be at work
        return os.waitpid(child, 0)[1]

    def _start(self) -> None:
        self._connection, other = multiprocessing.Pipe()
        if not (child := os.fork()):
            try:
                self._connection.close()
                _limit(resource.RLIMIT_DATA, MOST_MEMORY)
                _serve(other, self._function, self._seconds)
            finally:
                os._exit(1)
        other.close()
        self._child, self._left = child, TEXTS_A_COPY


def _failed() -> RuntimeError:
    return RuntimeError("it failed in a process of its own")


def _serve(connection: Connection, function: Callable[[str], Any], seconds: float) -> None:
    """Answer texts until the other end is closed; after an exception with nothing."""
    while True:
        text = connection.recv_bytes().decode("utf-8", "surrogatepass")
        usage = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime + seconds))
        try:
            answer = json.dumps(function(text)).encode()
        except Exception:
            answer = b""
        connection.send_bytes(answer)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[..., None],
    tasks: Sequence[tuple],
    workers: int,
    label: str,
    seconds: float | None = None,
) -> None:
    """Call `function(watch, *task)` for every task, in at most `workers` processes; with one worker
    and no time limit, in this process.

    seconds: CPU time that an item of a task may take. An item that takes longer in code that cannot
    be interrupted, or kills its worker, is left out when its task starts again. Raises a task's
    ValueError or OSError as such, other errors as RuntimeError.
    """
    progress = tqdm(total=len(tasks), desc=label, disable=None, leave=False)
    with progress:
        if seconds is None and (workers == 1 or len(tasks) == 1):
            for task in tasks:
                function(Watch(), *task)
                progress.update()
            return
        waiting = deque(_Job(function, task, seconds) for task in tasks)
        active: list[_Job] = []
        try:
            while waiting or active:
                while waiting and len(active) < workers:
                    active.append(waiting.popleft())
                    active[-1].start()
                wait([job.process.sentinel for job in active if job.process], timeout=0.5)
                for job in list(active):
                    if job.finished():
                        active.remove(job)
                        if job.done:
                            progress.update()
                        else:
                            # First, since the rest of its work is done only when it is.
                            waiting.appendleft(job)
        finally:
            for job in active:
                job.kill()


class _Job:
    """A task and the process that works on it."""

    def __init__(self, function: Callable[..., None], task: tuple, seconds: float | None) -> None:
        self._call = (function, task)
        self._seconds = seconds
        self._skip: frozenset[int] = frozenset()
        self.done = False
        self.process: BaseProcess | None = None

    def start(self) -> None:
        # Not fork: a fork copies locks that other threads (tqdm's, a tokenizer's) may hold.
        context = multiprocessing.get_context("spawn")
        self._state = context.Array("d", [float(NO_ITEM), 0.0], lock=False)
        self._reader, writer = context.Pipe(duplex=False)
        arguments = (*self._call, self._seconds, self._skip, self._state, os.getpid(), writer)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        # Else the pipe would stay open here and never report the end of the child.
        writer.close()

    def finished(self) -> bool:
        """Return whether the process has ended, or was killed here because it hung. Raise the
        task's error.
        """
        assert self.process is not None
        item, since = int(self._state[0]), self._state[1]
        if self.process.is_alive():
            if not (
                self._seconds
                and item != NO_ITEM
                and time.monotonic() - since > self._seconds * GRACE
            ):
                return False
            self.process.kill()
        self.process.join()
        code, item = self.process.exitcode, int(self._state[0])
        error = self._reader.recv() if self._reader.poll() and code == 1 else None
        self.kill()
        if isinstance(error, BaseException):
            raise error
        if code == 0:
            self.done = True
        # Between items no single one is to blame, and a retry would only die again; as it did in an
        # item that the task does not leave out.
        elif item == NO_ITEM or item in self._skip:
            raise RuntimeError(
                f"a worker process died with code {code}: the machine may be out of memory; run "
                "the same command to resume"
            )
        else:
            self._skip |= {item}
        return True

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self._reader.close()


def _work(
    function: Callable[..., None],
    task: tuple,
    seconds: float | None,
    skip: frozenset[int],
    state: Any,
    parent: int,
    writer: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    if seconds:
        signal.signal(signal.SIGPROF, _interrupt)
    try:
        function(Watch(seconds, skip, state, parent), *task)
    except (ValueError, OSError) as error:
        writer.send(error)
        os._exit(1)
    except BaseException as error:
        writer.send(RuntimeError(f"{type(error).__name__}: {error}"))
        os._exit(1)


def _interrupt(signum: int, frame: object) -> None:
    raise ItemTimeout
