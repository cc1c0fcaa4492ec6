"""One log file a rank; the terminal belongs to rank 0."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path

from memshard.redact import spelled, without_secrets

log = logging.getLogger(__name__)


class _RankFile(WatchedFileHandler):
    """A log file that is made anew when it was removed, and that says once that it cannot be
    written, in place of a traceback a line.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._failing = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self._failed = False
        try:
            super().emit(record)
        except OSError:  # of opening it anew
            self.handleError(record)
        self._failing = self._failed

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:
        """Say the first of several errors in a row."""
        self._failed = True
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failing:
            print(f"memshard: {self.baseFilename} cannot be written: {error}", file=sys.stderr)


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the record, with its traceback, as others may read it."""
        return spelled(without_secrets(super().format(record)))


@contextmanager
def rank_log(folder: Path, rank: int, step: Callable[[], int]) -> Iterator[Path]:
    """Append what memshard logs, and everybody's warnings and errors, to log/rank<N>.log in the
    run's folder; rank 0's warnings also go to standard error. Yields the file.

    step: returns the number of finished steps, for the line that a failure leaves.
    """
    path = folder / "log" / f"rank{rank}.log"
    handlers: list[logging.Handler] = [_RankFile(path)]
    handlers[0].setFormatter(_WithoutSecrets("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if rank == 0:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setLevel(logging.WARNING)
        handlers.append(terminal)
    root, memshard = logging.getLogger(), logging.getLogger("memshard")
    level = memshard.level
    logging.captureWarnings(True)
    memshard.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield path
    except Exception:
        for handler in handlers[1:]:  # the command prints the message itself
            root.removeHandler(handler)
        log.exception("the run failed at step %d", step())
        raise
    finally:
        memshard.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            with suppress(OSError):  # a full disk, which the file has said
                handler.close()
