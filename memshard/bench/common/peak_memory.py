"""Measure the memory that some work takes, in a new process."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


def peak_memory(work: Callable[..., Any], *args: Any, packages: tuple[str, ...] = ()) -> int | None:
    """Return the largest resident memory in bytes while `work(*args)` runs, above what its process
    had before; None where the system does not report it.

    work: a function at the top of a module. packages: imported before, so that they do not count.
    """
    # Not fork: a forked child begins with this process's memory, freed blocks included, and torch's
    # threads do not survive in it.
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(
        target=_run, args=(writer, torch.get_num_threads(), packages, work, args)
    )
    process.start()
    # The child has its own end. Were this one left open, `recv` would wait for ever on a child that
    # died instead of raising EOFError.
    writer.close()
    try:
        return reader.recv()
    except EOFError:
        raise RuntimeError(
            "the process that measures memory died; the machine may be short of it"
        ) from None
    finally:
        process.join()


def _run(
    writer: Connection,
    threads: int,
    packages: tuple[str, ...],
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    for package in packages:
        import_module(package)
    before = resident("VmRSS")
    work(*args)
    # The most since the process began, imports included: work that takes less than the imports did
    # at their worst would be overstated.
    peak = resident("VmHWM")
    writer.send(peak - before if before is not None and peak is not None else None)


def in_new_process(work: Callable[..., Any], *args: Any) -> Any:
    """Return `work(*args)`, run in a new process. work: a function at the top of a module."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Let processes started in this block give freed memory back to the system at once.

    glibc otherwise keeps freed blocks for later, and this hoard would count as the model's. It
    reads the two variables only when a process starts.
    """
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    before = {name: os.environ.get(name) for name in names}
    # glibc's own threshold for blocks that go straight back is 128 KiB and rises, as such blocks
    # are freed, to 32 MiB. Set by hand it stays, at 64 KiB here.
    os.environ.update(dict.fromkeys(names, "65536"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def resident(field: str) -> int | None:
    """Return bytes of this process by a field of /proc/self/status: VmRSS for the resident memory
    now, VmHWM for the most so far, RssAnon without mapped files. None where there is no such file.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(
        # The kernel writes "kB" and means KiB.
        int(line.split()[1]) * 1024
        for line in status.read_text(encoding="utf-8").splitlines()
        if line.startswith(f"{field}:")
    )
