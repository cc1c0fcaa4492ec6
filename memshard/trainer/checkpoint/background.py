"""Save a checkpoint while training goes on."""

import logging
import threading
import time
from collections.abc import Callable, Collection
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from memshard.trainer.checkpoint.save_load import save_checkpoint

log = logging.getLogger(__name__)

RETRY_SECONDS, RETRY_FACTOR = 60.0, 10.0
"""A save that the disk refused is tried again after this time, and ten times what it took."""


class BackgroundSave:
    """Runs one save at a time on a thread; all ranks start and await the same ones.

    Saves have a process group of their own, so their messages never mix with those of training.
    """

    def __init__(self) -> None:
        # gloo, since NCCL's collectives from two threads would have to keep one order on all ranks.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.seconds: float | None = None
        """Duration of the last save until it was committed; None before the first."""
        self.failed: OSError | None = None
        """Why the disk refused the last save, on all ranks; None if it did not."""
        self._retry_at = 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(
        self,
        folder: Path,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        files: dict[str, bytes],
        in_place: Collection[str],
        committed: Callable[[], None],
    ) -> None:
        """Wait for the previous save, start this one, and return once the tensors may change.
        Arguments are those of `save_checkpoint`.
        """
        self.wait()
        # Training goes on changing its progress, such as the list of recent losses.
        free, state, self.failed = threading.Event(), deepcopy(state), None
        begun = time.perf_counter()

        def save() -> None:
            try:
                save_checkpoint(
                    folder,
                    tensors,
                    state,
                    files,
                    group=self.group,
                    in_place=in_place,
                    free=free.set,
                    committed=committed,
                )
                self.seconds = time.perf_counter() - begun
            except OSError as error:
                # At once: training goes on, and may do so for hours until it looks.
                pause = RETRY_SECONDS + RETRY_FACTOR * (time.perf_counter() - begun)
                self._retry_at = time.monotonic() + pause
                self.failed = error
                log.warning("%s. The checkpoints before it stay", error)
            except BaseException as error:  # raised again in the thread that waits
                self._error = error
            finally:
                # Also after an error before the copy, or training would wait for ever.
                free.set()

        # A run that ends by an error must not wait for ranks that are gone.
        self._thread = threading.Thread(target=save, name="save", daemon=True)
        self._thread.start()
        free.wait()

    def retry_due(self) -> bool:
        """Return whether the last save failed, and long enough ago to try another one."""
        return self.failed is not None and time.monotonic() >= self._retry_at

    def finish_within(self, seconds: float) -> None:
        """Wait for the save in flight before a run ends by an error. Not without end: it needs all
        ranks, and one may be gone.
        """
        if self._thread is not None:
            self._thread.join(seconds)

    def wait(self) -> None:
        """Wait until the save in flight is committed, or the disk has refused it (`failed`). Any
        other error of it is raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
