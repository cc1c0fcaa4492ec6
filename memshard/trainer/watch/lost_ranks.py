"""What is left to say when ranks lose each other."""

import time

import torch.distributed as dist

from memshard.parallel.compat import last_collectives
from memshard.trainer.run import Run
from memshard.trainer.watch.heartbeat import late, read_beats, silent

FLIGHT = "flight"


def lost_each_other(error: BaseException) -> bool:
    """Whether an error came from a collective. gloo's are plain RuntimeErrors with the path of its
    source.
    """
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, dist.DistError) or "gloo" in str(chain):
            return True
        chain = chain.__cause__
    return False


def name_culprit(run: Run) -> str:
    """Who ended the run, by the heartbeats. Waits until one that stopped is known to have; also
    writes down the last collectives.
    """
    _write_flight_record(run)
    mine = next((beat for beat in read_beats(run.folder) if beat.rank == run.rank), None)
    deadline = time.time() + 3 * mine.interval + 1.5 if mine else 0.0
    while True:
        beats, now = read_beats(run.folder), time.time()
        if now > deadline or any(silent(beat, now) or beat.ended == "failed" for beat in beats):
            return "; ".join(late(beats, now)) or "no rank is behind: look at the network"
        time.sleep(0.1)


def _write_flight_record(run: Run) -> None:
    """This rank's last collectives, which `memshard doctor` compares."""
    folder = run.folder / FLIGHT
    try:
        folder.mkdir(exist_ok=True)
        (folder / f"rank{run.rank}.json").write_bytes(last_collectives())
    except (OSError, RuntimeError):
        pass  # only a help for whoever looks
