"""The journal of a search: a JSON line for each event, on disk before anything follows from it."""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

JOURNAL_FILE = "journal.jsonl"
Event = dict[str, Any]


def read(folder: Path) -> list[Event]:
    """Return all whole events of a folder's journal; none if there is no journal.

    ValueError names a damaged line.
    """
    path = folder / JOURNAL_FILE
    data = path.read_bytes() if path.exists() else b""
    events = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            events.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); cut the file before this line to go "
                "on from there"
            ) from error
    return events


class Journal:
    """A journal open for writing, by one process at a time: ValueError for a second one.

    A last line that a kill cut short is removed.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / JOURNAL_FILE).open("ab+")
        try:
            # Released by the kernel when the process ends, so no stale lock stays behind.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"{folder}: a search is running in this folder; wait for it, or choose another "
                "folder"
            ) from None
        self._file.seek(0)
        data = self._file.read()
        self._file.truncate(data.rfind(b"\n") + 1)
        self.events = read(folder)

    def write(self, event: Event) -> None:
        """Append an event. It is on disk when this returns."""
        self._file.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        # A child must not be handed out before its birth is on disk: a kill would
        # breed another one.
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
