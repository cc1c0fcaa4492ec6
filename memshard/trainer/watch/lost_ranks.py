"""Diagnose a failed collective: which rank was lost, and what it did last."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from memshard.io import file_time
from memshard.parallel.compat import last_collectives
from memshard.trainer.watch.heartbeat import (
    PHASES,
    Beat,
    Heartbeat,
    Phase,
    describe_stragglers,
    read_beats,
    silent,
)

FLIGHT = "flight"
NCCL_GRACE = 60.0
"""Seconds by which collectives on GPUs wait longer than `end_if_ranks_are_lost`."""


def is_collective_error(error: BaseException) -> bool:
    """Return whether an error came from a collective."""
    # gloo raises plain RuntimeErrors that name its source files.
    # The first error may be wrapped by the code that called the collective.
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, dist.DistError) or "gloo" in str(chain):
            return True
        chain = chain.__cause__
    return False


def describe_lost_ranks(folder: Path, rank: int) -> str:
    """Return which ranks ended the run, judging by the heartbeats in its folder, and save this
    rank's last collectives there. Waits a few seconds, until a rank that stopped counts as silent.
    """
    _write_flight_record(folder / FLIGHT, rank)
    mine = next((beat for beat in read_beats(folder) if beat.rank == rank), None)
    # A rank killed right after a beat counts as silent 2 intervals + 1 s later; a third interval
    # covers a file that appears late.
    deadline = time.monotonic() + 3 * mine.interval + 1.5 if mine else 0.0
    while True:
        beats, now = read_beats(folder), file_time(folder)
        over = any(silent(beat, now) or beat.ended == "failed" for beat in beats)
        if over or time.monotonic() > deadline:
            return "; ".join(describe_stragglers(beats, now)) or (
                "no rank is behind: look at the network"
            )
        time.sleep(0.1)


@contextmanager
def end_if_ranks_are_lost(
    heartbeat: Heartbeat, patience: Callable[[Phase], float], end: Callable[[RuntimeError], None]
) -> Iterator[None]:
    """In the block, call `end` from a thread once a rank that is lost, or behind, has held up this
    one for longer than `patience` of this one's phase in seconds.

    For NCCL: the main thread waits for the GPU then, and after its own timeout NCCL's watchdog
    aborts the process, without an error that Python could catch.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(heartbeat.beat.interval):
            mine, now = heartbeat.beat, time.time()
            if now - mine.since > patience(mine.phase) and _held_up(heartbeat.folder, mine):
                end(RuntimeError(describe_lost_ranks(heartbeat.folder, mine.rank)))
                return

    thread = threading.Thread(target=watch, name="lost ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _held_up(folder: Path, mine: Beat) -> bool:
    """Return whether another rank is lost, or has not come as far as this one."""
    others = [beat for beat in read_beats(folder) if beat.rank != mine.rank]
    now, place = file_time(folder), (mine.step, PHASES.index(mine.phase))
    return len(others) < mine.ranks - 1 or any(
        silent(beat, now) or beat.ended == "failed" or (beat.step, PHASES.index(beat.phase)) < place
        for beat in others
    )


def _write_flight_record(folder: Path, rank: int) -> None:
    """Write this rank's last collectives, which `memshard doctor` compares."""
    try:
        folder.mkdir(exist_ok=True)
        (folder / f"rank{rank}.json").write_bytes(last_collectives())
    except (OSError, RuntimeError):
        pass  # only a help for whoever looks
