"""Runs one test body on several processes."""

import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import DupFd
from typing import Any

import torch
import torch.distributed as dist

# Ranks are forked from a server: importing torch and the trainer would take each of them 3 s of
# CPU time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [__name__, "pytest", "memshard.parallel.apply", "memshard.trainer.loop"]
)


class _Streams:
    """Carries standard output and error to a rank as they are now, as pytest may have replaced them
    since the server's start.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _replace_streams, (DupFd(1), DupFd(2))


def _replace_streams(*streams: Any) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.detach(), number)


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo", timeout: float = 120
) -> list[Any]:
    """Return what `fn(rank, world_size, *args)` returns on each rank, a fresh process each, in one
    process group.

    `fn` is a function at the top of a module; arguments and results are pickled, tensors by value.
    With backend="nccl" rank r has GPU r. Raises AssertionError with the traceback of the rank that
    failed first, or after `timeout` seconds.
    """
    # Bytes, because multiprocessing's own pickling would let all ranks share the memory of one
    # tensor.
    call = pickle.dumps((fn, args))
    environment = dict(os.environ)  # the server has that of its start
    readers, processes = [], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            for rank in range(world_size):
                reader, writer = CONTEXT.Pipe(duplex=False)
                process = CONTEXT.Process(
                    target=_run_rank,
                    args=(
                        call,
                        environment,
                        rank,
                        world_size,
                        backend,
                        f"{folder}/store",
                        writer,
                        _Streams(),
                    ),
                )
                process.start()
                writer.close()
                readers.append(reader)
                processes.append(process)
            results = _collect(readers, timeout)
            for process in processes:
                process.join(10)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run_rank(
    call: bytes,
    environment: dict[str, str],
    rank: int,
    world_size: int,
    backend: str,
    store: str,
    writer: Connection,
    streams: None,
) -> None:
    threading.Thread(target=_end_with_pytest, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"
    )
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else None
    try:
        if device:
            torch.cuda.set_device(device)
        file_store = dist.FileStore(store, world_size)
        dist.init_process_group(
            backend, store=file_store, rank=rank, world_size=world_size, device_id=device
        )
        fn, args = pickle.loads(call)
        report = pickle.dumps((True, fn(rank, world_size, *args)))
        # Nobody leaves the group while another rank still talks to it.
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        report = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(report)


def _end_with_pytest() -> None:
    """End this rank when pytest is gone, however that ended: ranks are the server's children, which
    lives as long as one of them does.
    """
    pytest = multiprocessing.parent_process()
    assert pytest is not None
    pytest.join()
    os._exit(1)


def _collect(readers: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = {reader: rank for rank, reader in enumerate(readers) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(
                f"ranks {sorted(waiting.values())} of {len(readers)} not done after {timeout:g} s"
            )
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = waiting[reader]
            try:
                done, results[rank] = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise AssertionError(
                    f"rank {rank} of {len(readers)} died without a traceback"
                ) from None
            if not done:
                raise AssertionError(f"rank {rank} of {len(readers)} failed:\n{results[rank]}")
    return [results[rank] for rank in range(len(readers))]
