"""Stages for the tests of the driver: one that is well, and every way to end otherwise."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator

from memshard.bench.gpu.bench import Bench, Result


def well(bench: Bench) -> Iterator[tuple[str, Result]]:
    print("a line for the log")
    yield "one", {"value": 1}
    yield "two", {"value": bench.seconds, "ok": False}


def crash(bench: Bench) -> Iterator[tuple[str, Result]]:
    yield "before", {"value": 1}
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(bench: Bench) -> Iterator[tuple[str, Result]]:
    child = subprocess.Popen(["sleep", "600"])
    yield "before", {"child": child.pid}
    time.sleep(600)


def fail(bench: Bench) -> Iterator[tuple[str, Result]]:
    yield "before", {"value": 1}
    raise ValueError("CUDA error: an illegal memory access was encountered")
