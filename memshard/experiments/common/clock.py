"""Timed comparisons: a clock, and rounds in which everything takes its turn."""

import time
from collections.abc import Callable, Mapping

import torch


def now(device: torch.device) -> float:
    """Return seconds of a clock for differences.

    On a GPU it is the wall clock, read once all work asked of the GPU is done; on a CPU it is this
    process's processor time, which other work on the machine disturbs less.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def interleave(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Return the seconds that each action takes, a number a round.

    All actions take turns, so that a busy stretch of the machine meets all of them. A round before
    the others does not count: it builds kernels and warms caches and the allocator.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    # As round after round, not action after action: a ratio within a round cancels a slow minute.
    for _ in range(rounds + 1):
        for name, action in actions.items():
            begun = clock()
            action()
            seconds[name].append(clock() - begun)
    return {name: taken[1:] for name, taken in seconds.items()}
