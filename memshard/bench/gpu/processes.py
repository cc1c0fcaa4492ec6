"""Run a stage in a process of its own, which may crash or hang without harm to the others."""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from memshard.bench.gpu.catalogue import Stage
from memshard.search.processes import end_with_parent

_DYING = 10.0
"""Seconds for a killed process to go; one that waits for a driver may never."""


def results_of(
    stage: Stage, options: dict[str, Any], seconds: float, log: Path
) -> Iterator[tuple[str, Any]]:
    """Yield (name, result) as the stage yields them, and last ("", its outcome): done, failed,
    died or over its limit, with the problem.

    options: what `Bench` takes besides `seconds`. log: a file to which all that the stage prints
    is added.
    """
    # Not fork: the child of a process that has used CUDA cannot.
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(writer, stage.work, options, seconds, log))
    begun = time.monotonic()
    process.start()
    # The child has its own end: with this one open a dead child would be waited for.
    writer.close()
    outcome, problem = "over its limit", f"killed after {seconds:.0f} s"
    try:
        while reader.poll(max(0.0, begun + seconds - time.monotonic())):
            name, result = reader.recv()
            if not name:
                outcome, problem = ("failed", result) if result else ("done", "")
                break
            yield name, result
    except (EOFError, OSError):
        process.join(_DYING)
        outcome, problem = "died", f"exit code {process.exitcode}; the log's end may say why"
    finally:
        # The ranks that it has started, too.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join(_DYING)
    yield "", {"outcome": outcome, "problem": problem, "seconds": time.monotonic() - begun}


def _work(
    writer: Connection, work: str, options: dict[str, Any], seconds: float, log: Path
) -> None:
    os.setsid()  # one group with all that it starts, to be killed together
    with log.open("ab", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    end_with_parent()
    try:
        from memshard.bench.gpu.bench import Bench

        for name, result in resolve_name(work)(Bench(seconds=seconds, **options)):
            writer.send((name, result))
    # Whatever it is, it belongs to this stage's outcome.
    except BaseException as error:
        traceback.print_exc()
        writer.send(("", f"{type(error).__name__}: {error}"[:2000]))
    else:
        writer.send(("", ""))
