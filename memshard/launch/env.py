"""Which rank this process is, and joining the others."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


@contextmanager
def joined_ranks(timeout: float) -> Iterator[torch.device]:
    """Join the process group that torchrun (or another launcher that sets its variables) has prepared, if any.

    timeout: seconds that collectives wait for a rank. Yields this rank's device: a GPU where there is one, else the CPU.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the last collectives, for `memshard doctor`
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield device
    except Exception:
        atexit.register(_leave_at_once)
        raise
    if tensor := sys.modules.get("memshard.parallel.tensor"):
        tensor.leave()
    dist.destroy_process_group()


def _leave_at_once() -> None:
    """Leaving in order waits for the ranks that are lost, for seconds, and may end in an abort of gloo's threads (exit code -6)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
