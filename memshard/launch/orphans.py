"""Ranks whose launcher was killed save and end, and leave the run's folder to the next start."""

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1


def stop_without_parent() -> None:
    """Watch the process that started this one from a thread, and send this one SIGTERM, which saves
    and stops a run, when it is gone.
    """
    # A thread, because the main one may be busy for minutes in a step. By asking, since the
    # kernel's own signal also comes when a parent's thread ends, and on Linux alone.
    threading.Thread(target=_watch, args=(os.getppid(),), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def end_child_with_parent() -> None:
    """Between fork and exec of a program that is not ours: have it sent SIGTERM when its parent is
    gone. Does nothing but on Linux.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
