"""Worker processes: each takes one task at a time, is killed when it falls silent, and is replaced
when it dies.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from memshard.search.evolve.journal import Event
from memshard.search.processes import end_with_parent

Work = Callable[[Any], Iterator[Event]]
LOST = "lost"
START = 300.0  # seconds that a worker may take to import what it needs


def lost(task: Any, reason: str, silent: bool = False) -> Event:
    """Return the event of a task whose worker died, or was killed because it fell silent."""
    return {"event": LOST, "id": task.id, "do": task.do, "reason": reason, "silent": silent}


class Workers(Protocol):
    """Something that runs tasks. A task is anything with `id` and `do`; its events carry that id.

    For a worker that dies or hangs there is an event `lost` with the task's `do`.
    """

    count: int

    def submit(self, task: Any) -> None: ...

    def poll(self, seconds: float) -> list[Event]: ...

    def close(self) -> None: ...


class Processes:
    """Workers on this machine.

    timeout: seconds of silence until one is killed. memory: GiB that one may take beyond what it
    has at its start, None for no limit.
    """

    def __init__(self, work: Work, count: int, timeout: float, memory: float | None) -> None:
        self.count = count
        self._settings = (work, memory)
        self._timeout = timeout
        self._waiting: deque[Any] = deque()
        self._failed_starts = 0
        self._slots = [_Slot(*self._settings) for _ in range(count)]

    def submit(self, task: Any) -> None:
        """Queue a task."""
        self._waiting.append(task)
        self._hand_out()

    def poll(self, seconds: float) -> list[Event]:
        """Return the events that have come in, after at most `seconds`."""
        events: list[Event] = []
        by_connection = {slot.connection: number for number, slot in enumerate(self._slots)}
        for connection in wait(list(by_connection), timeout=seconds):
            assert isinstance(connection, Connection)
            number = by_connection[connection]
            slot = self._slots[number]
            try:
                # All that has come in: one event a turn would let a busy worker's queue grow.
                while connection.poll():
                    event = connection.recv()
                    slot.heard = time.monotonic()
                    if event is not None:
                        events.append(event)
                        continue
                    slot.ready, slot.task = True, None
                    self._failed_starts = 0
            except (EOFError, ConnectionResetError):
                events += self._lose(number, "its worker died with code {code}")
        for number, slot in enumerate(self._slots):
            if (slot.task is not None or not slot.ready) and time.monotonic() - slot.heard > (
                self._timeout if slot.ready else START
            ):
                events += self._lose(
                    number, f"no sign of life for {self._timeout:g} s", silent=True
                )
        self._hand_out()
        return events

    def close(self) -> None:
        """End all workers at once."""
        for slot in self._slots:
            slot.kill()

    def _lose(self, number: int, reason: str, silent: bool = False) -> list[Event]:
        slot = self._slots[number]
        slot.kill()
        code = slot.process.exitcode
        # Replacing workers for ever would hide a fault that every one of them has.
        self._failed_starts += not slot.ready
        if self._failed_starts > 2 * self.count:
            raise RuntimeError(f"worker processes die or hang at their start, with code {code}")
        self._slots[number] = _Slot(*self._settings)
        return [] if slot.task is None else [lost(slot.task, reason.format(code=code), silent)]

    def _hand_out(self) -> None:
        for slot in self._slots:
            if slot.ready and slot.task is None and self._waiting:
                slot.give(self._waiting.popleft())


class _Slot:
    """A process and the task it works on."""

    def __init__(self, work: Work, memory: float | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(other, work, memory), daemon=True
        )
        self.process.start()
        other.close()
        self.ready = False
        self.task: Any = None
        self.heard = time.monotonic()

    def give(self, task: Any) -> None:
        self.task, self.heard = task, time.monotonic()
        with contextlib.suppress(OSError):  # it has just died: poll hears that
            self.connection.send(task)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, work: Work, memory: float | None) -> None:
    """Serve tasks from the connection until its other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    end_with_parent()
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        # A limit on address space, of which torch maps several GB at import: count from there.
        limit = pages * os.sysconf("SC_PAGESIZE") + int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        connection.send(None)
        while True:
            for event in work(connection.recv()):
                connection.send(event)
            connection.send(None)
    except (EOFError, OSError):
        # Without cleaning up: the parent is gone, and torch's threads may hold locks.
        os._exit(0)
