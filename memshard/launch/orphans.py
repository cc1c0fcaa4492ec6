"""Ranks whose launcher was killed save and end, and leave the run's folder to the next start."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LAUNCHER = "MEMSHARD_LAUNCHER"
"""Variable with the number of the `memshard launch` that waits for ranks of its own host. DeepSpeed
has two processes between, which go on when it is killed.
"""
SAVE_SECONDS = 180
"""Time that ranks have to save after a signal."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def stop_without_parent() -> None:
    """Watch the process that started this one, LAUNCHER and DeepSpeed's runner from a thread, and
    send this one SIGTERM, which saves and stops a run, when one is gone.
    """
    # A thread, because the main one may be busy for minutes in a step. By asking, since the
    # kernel's own signal also comes when a parent's thread ends, and on Linux alone.
    launcher = int(os.environ.get(LAUNCHER, os.getpid()))
    watched = os.getppid(), launcher, _runner_above(os.getppid())
    threading.Thread(target=_watch, args=watched, name="parent", daemon=True).start()


def _watch(parent: int, launcher: int, runner: int) -> None:
    while os.getppid() == parent and _lives(launcher) and _lives(runner):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _runner_above(process: int) -> int:
    """Return DeepSpeed's runner if it started the process, which goes on without it; else this
    process.
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
        above = int(stat.rpartition(")")[2].split()[1])
        words = Path(f"/proc/{above}/cmdline").read_bytes().split(b"\0")[:4]
    except OSError:
        return os.getpid()
    runners = (b"deepspeed.launcher.runner", b"/deepspeed")
    return above if any(word.endswith(runners) for word in words) else os.getpid()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return True


def end_child_with_parent() -> None:
    """Between fork and exec of a program that is not ours: have it sent SIGTERM when its parent is
    gone. Does nothing but on Linux.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def outliving_launcher() -> Iterator[None]:
    """On leaving send SIGTERM to what a launcher that was started inside has left behind, and wait
    until it has ended, at most SAVE_SECONDS: DeepSpeed's dies of a signal while ranks still save.
    Does nothing but on Linux.
    """
    if sys.platform != "linux":
        yield
        return
    # Processes whose parent dies become this one's.
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    before, told = _children(), set[int]()
    try:
        yield
        deadline = time.monotonic() + SAVE_SECONDS
        while (orphans := _children() - before) and time.monotonic() < deadline:
            for orphan in orphans:
                if os.waitpid(orphan, os.WNOHANG)[0] == 0 and orphan not in told:
                    os.kill(orphan, signal.SIGTERM)
                    told.add(orphan)
            time.sleep(0.1)
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _children() -> set[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(number) for task in tasks for number in task.read_text("utf-8").split()}
