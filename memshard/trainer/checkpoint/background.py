"""Saving while training goes on."""

import threading
import time
from collections.abc import Callable, Collection
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from memshard.trainer.checkpoint.save_load import save_checkpoint


class BackgroundSave:
    """One save at a time, on a thread of its own; all ranks start and await the same ones.

    The ranks talk over a process group of their own, so that a save's messages never mix with those
    of training.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.seconds: float | None = None
        """How long the last save took, until it was committed."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(
        self,
        folder: Path,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        files: list[Path],
        in_place: Collection[str],
        committed: Callable[[], None],
    ) -> None:
        """Await the save before, begin this one, and return once the tensors may change; see
        `save_checkpoint`.
        """
        self.wait()
        free, state = threading.Event(), deepcopy(state)
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
            except BaseException as error:  # handed to the thread that waits
                self._error = error
            finally:
                free.set()

        # A run that ends by an error must not wait for ranks that are gone.
        self._thread = threading.Thread(target=save, name="save", daemon=True)
        self._thread.start()
        free.wait()

    def wait(self) -> None:
        """Return when the save in flight is committed; OSError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
