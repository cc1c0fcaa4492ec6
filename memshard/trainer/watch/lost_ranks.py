"""Diagnose a failed collective: which rank was lost, and what it did last."""

import time
from pathlib import Path

import torch.distributed as dist

from memshard.io import file_time
from memshard.parallel.compat import last_collectives
from memshard.trainer.watch.heartbeat import describe_stragglers, read_beats, silent

FLIGHT = "flight"


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


def _write_flight_record(folder: Path, rank: int) -> None:
    """Write this rank's last collectives, which `memshard doctor` compares."""
    try:
        folder.mkdir(exist_ok=True)
        (folder / f"rank{rank}.json").write_bytes(last_collectives())
    except (OSError, RuntimeError):
        pass  # only a help for whoever looks
