"""One log file a rank; the terminal belongs to rank 0."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memshard.trainer.run import Run

log = logging.getLogger(__name__)


@contextmanager
def rank_log(run: Run) -> Iterator[Path]:
    """What memshard logs, and everybody's warnings and errors, go to log/rank<N>.log in the run's
    folder; rank 0's warnings also to standard error. A start is appended to what earlier ones
    left. Yields the file.
    """
    folder = run.folder / "log"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{run.rank}.log"
    handlers: list[logging.Handler] = [logging.FileHandler(path)]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if run.rank == 0:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setLevel(logging.WARNING)
        handlers.append(terminal)
    root, own = logging.getLogger(), logging.getLogger("memshard")
    level = own.level
    logging.captureWarnings(True)
    own.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    place = f"{socket.gethostname()}, process {os.getpid()}, {run.device}"
    log.info("rank %d of %d starts at step %d: %s", run.rank, run.ranks, run.progress.step, place)
    try:
        yield path
    except Exception:
        for handler in handlers[1:]:  # the terminal gets the message alone, at the end
            root.removeHandler(handler)
        log.exception("the run failed at step %d", run.progress.step)
        raise
    finally:
        own.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
