"""Worker processes that end with the process that started them."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Watch the parent from a thread, and end this process when the parent is gone.

    A killed parent cannot stop its workers, which would go on for hours.
    """
    # A thread, because the main one may be busy for minutes in a training step.
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
