"""What each rank is doing, in one small file a rank, and what the files together say about a run
that hangs or failed.

The thread that writes lives while the main thread waits for other ranks, so a file that stays old
means a process that was killed, stopped or cut off, and a fresh one with an old phase means one
that waits.
"""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from memshard.io import atomic_write
from memshard.trainer.run import PHASES, Run

FOLDER = "heartbeat"


@dataclass(frozen=True)
class Beat:
    """step: the finished ones; phase: since the time `since`; time: of writing, every `interval`
    seconds; all times in Unix seconds. ended: None while the rank lives; then done, stopped or
    failed. error: the message of a failure.
    """

    rank: int
    ranks: int
    host: str
    pid: int
    step: int
    phase: str
    since: float
    time: float
    interval: float
    ended: str | None = None
    error: str | None = None


class Heartbeat:
    """Writes this rank's file, from a thread of its own. Use as a context manager around the
    loop.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path = run.folder / FOLDER / f"rank{run.rank}.json"
        now = time.time()
        # A thousand ranks then make some 200 files a second, which a shared file system bears.
        interval = min(max(run.ranks / 64, 1.0), 5.0)
        host = socket.gethostname()
        self.beat = Beat(
            run.rank, run.ranks, host, os.getpid(), run.progress.step, run.phase, now, now, interval
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.run.rank == 0:
            for path in self.path.parent.glob("rank*.json"):
                if int(path.stem[4:]) >= self.run.ranks:  # of an earlier start on more ranks
                    path.unlink()
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is None:
            self._write(ended=self.run.phase)
        else:
            self._write(
                ended="failed", error=f"{type(error).__name__}: {' '.join(str(error).split())}"
            )

    def _keep_writing(self) -> None:
        while not self._over.wait(self.beat.interval):
            self._write()

    def _write(self, ended: str | None = None, error: str | None = None) -> None:
        now, step, phase = time.time(), self.run.progress.step, self.run.phase
        if ended in ("done", "stopped"):
            phase = self.beat.phase
        since = self.beat.since if (step, phase) == (self.beat.step, self.beat.phase) else now
        self.beat = replace(
            self.beat, step=step, phase=phase, since=since, time=now, ended=ended, error=error
        )
        # A full disk must not end a run for the sake of its heartbeat.
        with suppress(OSError), atomic_write(self.path) as file:
            file.write_text(json.dumps(asdict(self.beat)))


def read_beats(folder: Path) -> list[Beat]:
    """The heartbeats in a run folder, by rank; files that cannot be read are left out."""
    beats = []
    for path in (folder / FOLDER).glob("rank*.json"):
        try:
            beats.append(Beat(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(beats, key=lambda beat: beat.rank)


def silent(beat: Beat, now: float) -> bool:
    """Whether a rank that should live has missed two beats."""
    return beat.ended is None and now - beat.time > 2 * beat.interval + 1


def late(beats: list[Beat], now: float) -> list[str]:
    """Who holds the others up or ended the run, in words: silent and missing ranks, or the one that
    failed first, or who is behind.
    """
    if not beats:
        return []
    lost = [beat for beat in beats if silent(beat, now)]
    found = [
        f"{_name(beat)} has been silent for {now - beat.time:.0f} s: killed, stopped or cut off"
        for beat in lost
    ]
    missing = sorted(set(range(beats[0].ranks)) - {beat.rank for beat in beats})
    if missing:
        found.append(
            f"no sign of rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}: not "
            "started, or on another file system"
        )
    failed = [beat for beat in beats if beat.ended == "failed"]
    if found or failed:
        first = [] if found else [min(failed, key=lambda beat: beat.time)]
        return found + [f"{_name(beat)} failed first: {beat.error}" for beat in first]
    alive = [beat for beat in beats if beat.ended is None]
    places = {beat.rank: (beat.step, PHASES.index(beat.phase)) for beat in alive}
    behind = [beat for beat in alive if places[beat.rank] < max(places.values())]
    return [
        f"{_name(beat)} is behind, for {now - beat.since:.0f} s now"
        for beat in behind
        if places[beat.rank] == min(places.values())
    ]


def _name(beat: Beat) -> str:
    return (
        f"rank {beat.rank} (process {beat.pid} on {beat.host}), in step {beat.step + 1}, "
        f"{beat.phase},"
    )
