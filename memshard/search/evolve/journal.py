"""The journal of a search: a JSON line for each event, on disk before anything follows from it."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from memshard.io import read_json_lines, sync
from memshard.lock import holding

JOURNAL_FILE = "journal.jsonl"
Event = dict[str, Any]


def read(folder: Path) -> list[Event]:
    """Return all whole events of a folder's journal; none if there is no journal.

    ValueError names a damaged line.
    """
    return read_json_lines(folder / JOURNAL_FILE)


class Journal:
    """A journal open for writing, by one process at a time: FolderHeld for a second one.

    A last line that a kill cut short is removed.
    """

    def __init__(self, folder: Path) -> None:
        with ExitStack() as stack:
            self._lock = stack.enter_context(holding(folder, "choose another folder"))
            self._file = stack.enter_context((folder / JOURNAL_FILE).open("ab+"))
            self._file.seek(0)
            data = self._file.read()
            self._file.truncate(data.rfind(b"\n") + 1)
            self.events = read(folder)
            self._held = stack.pop_all()

    def write(self, event: Event) -> None:
        """Append an event. It is on disk when this returns. RuntimeError if another process has
        taken the folder over, whose journal this is now.
        """
        if not self._lock.holds():
            raise RuntimeError(f"{self._lock.path.parent} belongs to another process now")
        self._file.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        # A child must not be handed out before its birth is on disk: a kill would
        # breed another one.
        sync(self._file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()
