"""A rank that is killed, or hangs, is noticed and named; heartbeats tell who is late."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from memshard.trainer.run import Run
from memshard.trainer.watch.heartbeat import Beat, Heartbeat, describe_stragglers, read_beats
from tests.trainer.tiny_run import prepare

TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "3",
    "-m",
    "--",
    "memshard",
    "train",
)


def _beats(folder: Path) -> list[Beat]:
    """Return the heartbeats of all three ranks, once they train."""
    beats = [beat for beat in read_beats(folder) if beat.step > 2]
    return beats if len(beats) == 3 else []


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_lost_rank_is_named(number: signal.Signals, recipe: Path, tmp_path: Path) -> None:
    command = (
        *TORCHRUN,
        str(recipe),
        "--run",
        str(tmp_path / "run"),
        "train.steps=100000",
        "guards.timeout=4",
    )
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "8"},
    )
    try:
        deadline = time.monotonic() + 90
        while not (beats := _beats(tmp_path / "run")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(beats[1].pid, number)
        _, err = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert process.returncode == 1
    culprit = f"RuntimeError: rank 1 (process {beats[1].pid} on {beats[1].host}), in step "
    first, lost, second = read_beats(tmp_path / "run")
    assert lost.ended is None
    for survivor in (first, second):
        assert survivor.ended == "failed" and survivor.error is not None
        assert survivor.error.startswith(culprit) and "has been silent for" in survivor.error
        assert "rank 0 (" not in survivor.error and "rank 2 (" not in survivor.error
    assert f"memshard: error: {culprit}" in err and f"memshard: error: rank 2: {culprit}" in err
    assert {path.name for path in (tmp_path / "run/flight").iterdir()} == {
        "rank0.json",
        "rank2.json",
    }


def _heartbeat(run: Run) -> Heartbeat:
    return Heartbeat(run.folder, 0, 1, lambda: (run.progress.step, run.phase))


def test_heartbeats_follow_the_run(recipe: Path, tmp_path: Path) -> None:
    run = prepare(recipe, tmp_path / "run")
    with _heartbeat(run) as heartbeat:
        (beat,) = read_beats(run.folder)
        assert (beat.rank, beat.pid, beat.step, beat.phase, beat.ended) == (
            0,
            os.getpid(),
            0,
            "starting",
            None,
        )
        run.phase, run.progress.step = "reading data", 7
        deadline = time.monotonic() + 10
        while read_beats(run.folder)[0].step == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert read_beats(run.folder)[0].phase == "reading data"
        assert heartbeat.beat.interval == 1
    with pytest.raises(ValueError, match="two"), _heartbeat(run):
        raise ValueError("line one\nline two")
    (beat,) = read_beats(run.folder)
    assert (beat.ended, beat.error) == ("failed", "ValueError: line one line two")


def test_a_clock_that_is_off_changes_no_age(tmp_path: Path) -> None:
    """Ranks 0 and 1 have a clock that is ten minutes ahead; rank 2 is killed, its clock behind."""
    now = time.time()
    (tmp_path / "heartbeat").mkdir()
    for rank, age, clock in ((0, 0, 600), (1, 0, 600), (2, 30, -600)):
        since = now - age - 40
        phase = "forward and backward" if rank else "agreeing on a verdict"
        beat = Beat(rank, 3, "n1", 100, 9, phase, since + clock, now - age + clock, 1.0)  # type: ignore[arg-type]
        path = tmp_path / f"heartbeat/rank{rank}.json"
        path.write_text(json.dumps(asdict(beat)))
        os.utime(path, (now - age, now - age))
    beats = read_beats(tmp_path)
    (line,) = describe_stragglers(beats, now)
    assert line.startswith("rank 2 (") and "silent for 30 s" in line
    (line,) = describe_stragglers([*beats[:2], replace(beats[2], ended="done")], now)
    assert line.startswith("rank 1 (") and line.endswith("is behind, for 40 s now")


def test_who_is_late() -> None:
    now = time.time()
    beats = [
        Beat(rank, 3, "n1", 100 + rank, 40, "forward and backward", now - 60, now, 1.0)
        for rank in range(3)
    ]
    assert describe_stragglers(beats, now) == []
    reading = [beats[0], replace(beats[1], phase="reading data", since=now - 70), beats[2]]
    assert describe_stragglers(reading, now) == [
        "rank 1 (process 101 on n1), in step 41, reading data, is behind, for 70 s now"
    ]
    earlier = [replace(beats[0], step=39, phase="saving", since=now - 90), *reading[1:]]
    assert describe_stragglers(earlier, now) == [
        "rank 0 (process 100 on n1), in step 40, saving, is behind, for 90 s now"
    ]
    dead = [beats[0], beats[1], replace(beats[2], time=now - 30)]
    (line,) = describe_stragglers(dead, now)
    assert (
        line
        == "rank 2 (process 102 on n1), in step 41, forward and backward, has been silent for 30 "
        "s: killed, stopped or cut off"
    )
    failed = [
        replace(beats[0], ended="failed", error="peer", time=now),
        replace(beats[1], ended="failed", error="bug", time=now - 1),
    ]
    assert (
        describe_stragglers(failed, now + 100)[0]
        == "no sign of rank 2: not started, or on another file system"
    )
    assert describe_stragglers([*failed, replace(beats[2], ended="stopped")], now + 100) == [
        "rank 1 (process 101 on n1), in step 41, forward and backward, failed first: bug"
    ]
    assert describe_stragglers([replace(beat, ended="done") for beat in beats], now + 1000) == []


_WAITS_FOR_A_GPU = """
import sys, time
from functools import partial
from pathlib import Path
from memshard.launch.cli.train import _end
from memshard.trainer.watch.heartbeat import Heartbeat
from memshard.trainer.watch.lost_ranks import end_if_ranks_are_lost

rank = int(sys.argv[2])
phase = ("agreeing on a verdict", sys.argv[3])[rank]
heartbeat = Heartbeat(Path(sys.argv[1]), rank, 2, lambda: (7, phase))
with heartbeat, end_if_ranks_are_lost(heartbeat, lambda _: 2.0, partial(_end, heartbeat)):
    time.sleep(8 if sys.argv[3] == "agreeing on a verdict" else 60)
"""


def _waiting(folder: Path, phase: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", _WAITS_FOR_A_GPU, str(folder), str(rank), phase],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


@pytest.mark.parametrize(("number", "phase"), [(signal.SIGKILL, "updating"), (0, "reading data")])
def test_a_rank_that_waits_for_its_gpu_names_who_holds_it_up(
    number: int, phase: str, tmp_path: Path
) -> None:
    """NCCL raises nothing, but aborts; a thread ends the process before it does."""
    waiting, other = _waiting(tmp_path, phase)
    try:
        while len(read_beats(tmp_path)) < 2:
            time.sleep(0.1)
        other.send_signal(number)
        _, err = waiting.communicate(timeout=40)
        assert other.poll() == (-number or None)  # who is behind waits for nobody
    finally:
        waiting.kill()
        other.kill()
        other.communicate()
    assert waiting.returncode == 1
    culprit = f"rank 1 (process {other.pid} on "
    assert culprit in err and "rank 0 (" not in err
    first = read_beats(tmp_path)[0]
    assert first.ended == "failed" and culprit in (first.error or "")


def test_ranks_that_are_slow_together_are_left_alone(tmp_path: Path) -> None:
    for process in _waiting(tmp_path, "agreeing on a verdict"):
        process.communicate(timeout=60)
        assert process.returncode == 0
