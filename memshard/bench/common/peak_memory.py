"""The memory that one measured piece of work takes, in a process of its own."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


def peak_memory(work: Callable[..., Any], *args: Any) -> int | None:
    """Largest resident memory, bytes, while `work(*args)` runs, above what the process had before;
    None where the system does not tell.

    work: a function at the top of a module.
    """
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(writer, torch.get_num_threads(), work, args))
    process.start()
    writer.close()
    try:
        return reader.recv()
    except EOFError:
        raise RuntimeError(
            "the process that measures memory died; the machine may be short of it"
        ) from None
    finally:
        process.join()


def _run(writer: Connection, threads: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    before = _resident("VmRSS")
    work(*args)
    peak = _resident("VmHWM")
    writer.send(peak - before if before is not None and peak is not None else None)


def _resident(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(
        int(line.split()[1]) * 1024
        for line in status.read_text().splitlines()
        if line.startswith(f"{name}:")
    )
