"""Steps read ahead by worker processes, for raw text, whose tokenizer training would wait for."""

import logging
import multiprocessing
import pickle
import signal
import threading
from typing import Any

from torch.utils.data import DataLoader, Dataset

from memshard.data_pipeline.stream.batch import Batch
from memshard.data_pipeline.stream.open_stream import AnyStream
from memshard.data_pipeline.stream.rank_share import rank_share

log = logging.getLogger(__name__)
_NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class _Steps(Dataset[list[Batch] | Exception]):
    def __init__(self, stream: AnyStream, share: tuple[int, int, int, int | None]) -> None:
        self._stream, self._share = stream, share

    def __getitem__(self, step: int) -> list[Batch] | Exception:
        """Return a step, or the error that reading it raised: torch would turn an error into one
        whose message is the worker's traceback.
        """
        try:
            return rank_share(self._stream, step, *self._share)
        except Exception as error:
            pickle.dumps(error)  # one that no queue takes is left to torch
            return error


class Prefetched:
    """An iterator over `rank_share` of steps first to last - 1, in order, read by processes.

    They have no state, so their number changes nothing, and one that is killed, as where memory is
    short, is replaced; RuntimeError if that happens twice at a step. Signals that stop a run do not
    reach them: batch systems send those to every process.
    """

    def __init__(
        self,
        stream: AnyStream,
        first: int,
        last: int,
        batch: int,
        rank: int,
        ranks: int,
        micro_batch: int | None,
        workers: int,
    ) -> None:
        self._share = _Steps(stream, (batch, rank, ranks, micro_batch))
        self._next, self._last, self._number = first, last, workers
        self._killed_at: int | None = None
        self._start()

    def _start(self) -> None:
        loader = DataLoader(
            self._share,
            batch_size=None,
            sampler=range(self._next, self._last),
            num_workers=self._number,
        )
        before = set(multiprocessing.active_children())
        # Workers inherit the mask, so that not even their first moments hear a signal.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            self._steps: Any = iter(loader)
        finally:
            # torch's raises an error of a worker that was killed wherever this process is.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._workers = set(multiprocessing.active_children()) - before

    def __iter__(self) -> "Prefetched":
        return self

    def __next__(self) -> list[Batch]:
        assert self._steps is not None
        batch: list[Batch] | Exception
        try:
            batch = next(self._steps)
        except RuntimeError as error:
            dead = [worker for worker in self._workers if not worker.is_alive()]
            if not dead:
                raise
            codes = ", ".join(str(worker.exitcode) for worker in dead)
            self.close()
            if self._next == self._killed_at:
                raise RuntimeError(
                    f"processes that read data are killed again and again (exit code {codes}): the "
                    "machine may be out of memory; lower data.workers"
                ) from error
            log.warning("a process that reads data was killed (%s): started again", codes)
            self._killed_at = self._next
            self._start()
            return next(self)
        if isinstance(batch, Exception):
            raise batch
        self._next += 1
        return batch

    def close(self) -> None:
        """End the workers; steps that they have read ahead are forgotten."""
        if self._steps is None:
            return
        # Not left to its finalizer: a traceback may hold the iterator until Python ends, which then
        # waits for ever for workers that hear no SIGTERM. torch waits seconds for one that reads.
        self._steps._shutdown_workers()
        self._steps = None
        for worker in self._workers:
            worker.kill()
            worker.join()
