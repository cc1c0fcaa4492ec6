"""A file that grows by lines, for as long as a run takes."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)


class LineFile:
    """Appends lines to a file. Neither a full disk nor its removal ends the run.

    Lines that cannot be written now are kept and written with the next ones; a file that is gone is
    made anew with all of its lines; one that was cut is gone on with. All are said once.

    owned: asked then whether this process may write there, or another has made a file of its own.
    """

    def __init__(self, path: Path, owned: Callable[[], bool] = lambda: True) -> None:
        self._path = path
        self._owned = owned
        self._waiting = b""
        self.failing = False
        """Whether the last write failed."""
        # Readable, so that the lines of a file that was removed can be written again.
        self._file = path.open("ab+", buffering=0)
        self._size = self._file.tell()

    def write(self, line: str) -> None:
        """Append a line. It is with the system when this returns, unless that failed: a run that is
        killed must not lose the lines that explain why.
        """
        self._waiting += line.encode() + b"\n"
        self._write_waiting()

    def close(self) -> None:
        """Close the file."""
        if self._waiting:
            self._write_waiting()
        self._file.close()

    def _write_waiting(self) -> None:
        try:
            self._make_anew_if_gone()
            self._look_whether_cut()
            while self._waiting:
                # A disk that is nearly full takes the first part.
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            if not self.failing:
                log.warning(
                    "%s cannot be written (%s): its lines are kept and tried again",
                    self._path,
                    error,
                )
            self.failing = True
        else:
            self.failing = False

    def _look_whether_cut(self) -> None:
        if os.fstat(self._file.fileno()).st_size < self._size:
            # What is left may end within a line, which must not take the next one with it.
            self._waiting, self._size = b"\n" + self._waiting, 0
            log.warning("%s was cut by something else: lines of it are lost", self._path)

    def _make_anew_if_gone(self) -> None:
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                return
        except FileNotFoundError:
            pass
        if not self._owned():
            raise PermissionError("it belongs to another process now")
        gone, self._file = self._file, self._path.open("ab+", buffering=0)
        with gone:
            if os.fstat(self._file.fileno()).st_size == 0:
                gone.seek(0)
                self._waiting = gone.read() + self._waiting
        self._size = 0
        log.warning("%s was removed or replaced: it is made anew", self._path)
