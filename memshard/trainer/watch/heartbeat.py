"""One small file a rank says what the rank is doing; read together, they say why a
run hangs or failed.

The thread that writes lives while the main thread waits for other ranks, so a file that stays old
means a process that was killed, stopped or cut off, and a fresh one with an old phase means one
that waits.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter

from memshard.io import atomic_write, read_small
from memshard.redact import without_secrets

FOLDER = "heartbeat"
Phase = Literal[
    "starting",
    "reading data",
    "forward and backward",
    "agreeing on a verdict",
    "updating",
    "evaluating",
    "saving",
    "done",
    "stopped",
]
"""What a rank is doing, in the order of a step."""
PHASES = get_args(Phase)
_MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life; times are Unix seconds.

    step: number of finished steps. since: when `phase` began. time: when this was written, which
    happens every `interval` seconds. ended: None while the rank lives; then done, stopped or
    failed. error: the message of a failure.
    """

    rank: Annotated[int, Field(ge=0)]
    ranks: Annotated[int, Field(ge=1, le=_MOST_RANKS)]
    host: str
    pid: int
    step: Annotated[int, Field(ge=0)]
    phase: Phase
    since: float
    time: float
    interval: float
    ended: str | None = None
    error: str | None = None


_BEAT = TypeAdapter(Beat)


class Heartbeat:
    """Writes this rank's file from a thread. Use it as a context manager around the loop.

    folder: of the run. current: returns the number of finished steps and the phase. owned: returns
    whether the folder is still this run's; nothing is written once it is not.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        current: Callable[[], tuple[int, Phase]],
        owned: Callable[[], bool] = lambda: True,
    ) -> None:
        self._owned = owned
        self.folder = folder
        self.path = folder / FOLDER / f"rank{rank}.json"
        self._current = current
        now = time.time()
        # A thousand ranks then make some 200 files a second, which a shared file system bears.
        interval = min(max(ranks / 64, 1.0), 5.0)
        step, phase = current()
        host = socket.gethostname()
        self.beat = Beat(rank, ranks, host, os.getpid(), step, phase, now, now, interval)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.beat.rank == 0:
            for path in self.path.parent.iterdir():
                match = re.fullmatch(r"rank(\d+)\.json", path.name)
                if match and int(match[1]) >= self.beat.ranks:  # of an earlier start on more ranks
                    path.unlink()
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if error is None:
            self._over.set()
            self._thread.join()
            self._write(ended=self._current()[1])
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Write, as the last beat, that the rank failed, and why."""
        self._over.set()
        self._thread.join()
        message = without_secrets(" ".join(str(error).split()))
        self._write(ended="failed", error=f"{type(error).__name__}: {message}")

    def _keep_writing(self) -> None:
        # wait() returns as soon as the run ends, so leaving costs no interval.
        while not self._over.wait(self.beat.interval):
            self._write()

    def _write(self, ended: str | None = None, error: str | None = None) -> None:
        now = time.time()
        step, phase = self._current()
        if ended in ("done", "stopped"):
            # The phase before the end says more than "done" a second time.
            phase = self.beat.phase
        since = self.beat.since if (step, phase) == (self.beat.step, self.beat.phase) else now
        self.beat = replace(
            self.beat, step=step, phase=phase, since=since, time=now, ended=ended, error=error
        )
        if not self._owned():
            return
        text = json.dumps(asdict(self.beat))
        # A full disk must not end a run for the sake of its heartbeat.
        with suppress(OSError):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)  # someone may have removed it
                with atomic_write(self.path) as file:
                    file.write_text(text, encoding="utf-8")
            except OSError:
                # In place needs no new block: of a run that ends here, others must know why.
                with self.path.open("r+", encoding="utf-8") as old:
                    old.write(text)
                    old.truncate()


def read_beats(folder: Path) -> list[Beat]:
    """Return the heartbeats in a run folder by rank, without files that cannot be read. Times are
    those of the folder's file server (`memshard.io.file_time`).
    """
    beats = []
    for path in (folder / FOLDER).glob("rank*.json"):
        try:
            # Doctor and ranks count with these numbers, whoever wrote them.
            beat = _BEAT.validate_json(read_small(path), strict=True)
            ahead = path.stat().st_mtime - beat.time
        except (OSError, ValueError):
            continue
        # The rank's clock is off; by hours, the file was copied.
        if abs(ahead) < 3600:
            beat = replace(beat, time=beat.time + ahead, since=beat.since + ahead)
        beats.append(beat)
    return sorted(beats, key=lambda beat: beat.rank)


def silent(beat: Beat, now: float) -> bool:
    """Return whether a rank that should be alive has missed two beats."""
    # Two intervals, and a second for a slow write or clocks that differ between nodes.
    return beat.ended is None and now - beat.time > 2 * beat.interval + 1


def describe_stragglers(beats: list[Beat], now: float) -> list[str]:
    """Return lines that say who delays the others or ended the run: silent and missing ranks, else
    the rank that failed first, else the ranks that are behind.
    """
    if not beats:
        return []
    lost = [beat for beat in beats if silent(beat, now)]
    lines = [
        f"{_name(beat)} has been silent for {now - beat.time:.0f} s: killed, stopped or cut off"
        for beat in lost
    ]
    missing = sorted(set(range(beats[0].ranks)) - {beat.rank for beat in beats})
    if missing:
        lines.append(
            f"no sign of rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}: not "
            "started, or on another file system"
        )
    failed = [beat for beat in beats if beat.ended == "failed"]
    if lines or failed:
        first = [] if lines else [min(failed, key=lambda beat: beat.time)]
        return lines + [f"{_name(beat)} failed first: {beat.error}" for beat in first]
    alive = [beat for beat in beats if beat.ended is None]
    # No rank passes a collective before all have come, so those that wait are ahead of those they
    # wait for: of 8 ranks "agreeing on a verdict" and one in "forward and backward", the
    # one is to blame.
    places = {beat.rank: (beat.step, PHASES.index(beat.phase)) for beat in alive}
    behind = [beat for beat in alive if places[beat.rank] < max(places.values())]
    return [
        f"{_name(beat)} is behind, for {max(now - beat.since, 0):.0f} s now"
        for beat in behind
        if places[beat.rank] == min(places.values())
    ]


def _name(beat: Beat) -> str:
    return (
        f"rank {beat.rank} (process {beat.pid} on {beat.host}), in step {beat.step + 1}, "
        f"{beat.phase},"
    )
