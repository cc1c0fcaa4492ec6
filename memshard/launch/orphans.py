"""Ranks whose launcher was killed save and end, and leave the run's folder to the next start."""

import ctypes
import os
import signal
import sys
import threading
import time

LAUNCHER = "MEMSHARD_LAUNCHER"
"""Variable with the number of the `memshard launch` that waits for ranks of its own host. DeepSpeed
has two processes between, which go on when it is killed.
"""
_PR_SET_PDEATHSIG = 1


def stop_without_parent() -> None:
    """Watch the process that started this one, and LAUNCHER, from a thread, and send this one
    SIGTERM, which saves and stops a run, when one is gone.
    """
    # A thread, because the main one may be busy for minutes in a step. By asking, since the
    # kernel's own signal also comes when a parent's thread ends, and on Linux alone.
    launcher = int(os.environ.get(LAUNCHER, os.getpid()))
    watched = os.getppid(), launcher
    threading.Thread(target=_watch, args=watched, name="parent", daemon=True).start()


def _watch(parent: int, launcher: int) -> None:
    while os.getppid() == parent and _lives(launcher):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


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
