"""The clock of timed comparisons."""

import time

import torch


def now(device: torch.device) -> float:
    """Seconds: on a GPU of the clock on the wall, when all that was asked of it is done; on a CPU
    of this process's processor time, which other work on the machine disturbs less.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
