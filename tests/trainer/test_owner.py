"""Two starts in one run folder: the second is refused while the first lives; ranks whose launcher
was killed save, end and make way.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from memshard.launch.launchers.start import RENDEZVOUS
from memshard.lock import LOCK_FILE
from memshard.trainer.checkpoint.folders import committed
from memshard.trainer.watch.heartbeat import Beat, read_beats
from memshard.trainer.watch.metrics import METRICS_FILE
from tests.trainer.tiny_run import checkpoint_state, numbers

ENDLESS = "train.steps=100000"
MEMSHARD = (sys.executable, "-m", "memshard")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@contextmanager
def _running(
    *command: object, variables: Mapping[str, str] = os.environ
) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=60)


def _wait_for_step(folder: Path, step: int, ranks: int = 1) -> list[Beat]:
    deadline = time.monotonic() + 90
    while len(beats := [beat for beat in read_beats(folder) if beat.step >= step]) < ranks:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return beats


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("second", "code"),
    [
        pytest.param(MEMSHARD, 2, id="alone"),
        pytest.param((*TORCHRUN, "-m", "--", "memshard"), 1, id="ranks", marks=pytest.mark.slow),
    ],
)
def test_a_second_start_in_a_run_folder_is_refused_and_the_first_goes_on(
    second: tuple[str, ...], code: int, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with _running(*MEMSHARD, "train", recipe, "--run", folder, ENDLESS) as first:
        _wait_for_step(folder, 3)
        done = subprocess.run(
            [*second, "train", str(recipe), "--run", str(folder), ENDLESS],
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        told = f"memshard: error: {folder} is in use by process {first.pid} on "
        assert done.stderr.count(told) == 1, done.stderr
        assert "choose another folder with --run" in done.stderr
        first.terminate()
        _, err = first.communicate(timeout=60)
    assert first.returncode == 75, err
    (checkpoint,) = committed(folder / "checkpoints")
    steps = checkpoint_state(checkpoint)["progress"]["step"]
    assert list(numbers(folder, "train/loss")) == list(range(1, steps + 1))
    assert not (folder / LOCK_FILE).exists()


def test_ranks_whose_torchrun_was_killed_save_and_make_way(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with _running(
        *TORCHRUN, "-m", "--", "memshard", "train", recipe, "--run", folder, ENDLESS
    ) as run:
        beats = _wait_for_step(folder, 3, ranks=2)
        run.kill()
        deadline = time.monotonic() + 30
        while any(_alive(beat.pid) for beat in beats):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert [beat.ended for beat in read_beats(folder)] == ["stopped", "stopped"]
    (checkpoint,) = committed(folder / "checkpoints")
    assert checkpoint_state(checkpoint)["progress"]["step"] == max(numbers(folder, "train/loss"))
    assert not (folder / LOCK_FILE).exists()


def test_a_run_whose_folder_was_taken_over_ends_and_writes_nothing(
    recipe: Path, tmp_path: Path
) -> None:
    """As after a pause of half a minute, in which a start on another host took it for dead."""
    folder = tmp_path / "run"
    with _running(*MEMSHARD, "train", recipe, "--run", folder, ENDLESS) as run:
        _wait_for_step(folder, 3)
        other = {**json.loads((folder / LOCK_FILE).read_text()), "host": "n17", "token": "other"}
        files = {LOCK_FILE: json.dumps(other), METRICS_FILE: "", "heartbeat/rank0.json": "{}"}
        for name, text in files.items():
            (folder / "theirs").write_text(text)
            (folder / "theirs").rename(folder / name)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 1 and f"{folder} belongs to another process now" in err, err
    assert "was taken over by process" in err and " on n17" in err
    assert {name: (folder / name).read_text() for name in files} == files
    assert not committed(folder / "checkpoints")


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
def test_a_killed_launch_command_stops_its_torchrun(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launch = ("launch", "local", recipe, "--ranks", 1, "--run", folder, ENDLESS)
    with _running(*MEMSHARD, *launch) as run:
        _wait_for_step(folder, 3)
        run.kill()
        deadline = time.monotonic() + 30
        while read_beats(folder)[0].ended is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert read_beats(folder)[0].ended == "stopped" and committed(folder / "checkpoints")


@pytest.mark.slow
def test_restarts_by_torchrun_of_a_rank_that_was_killed_are_not_refused(
    recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = (*TORCHRUN, "--max-restarts=1", "-m", "--", "memshard", "train", recipe)
    settings = ("--run", folder, ENDLESS, "train.save_every=5", "guards.timeout=4")
    with _running(*command, *settings, variables=RENDEZVOUS) as run:
        (first, _) = _wait_for_step(folder, 6, ranks=2)
        os.kill(first.pid, signal.SIGKILL)
        deadline = time.monotonic() + 90
        while not (beats := read_beats(folder)) or beats[0].pid == first.pid or beats[0].step < 8:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        run.terminate()
        _, err = run.communicate(timeout=60)
    assert f"was in use by process {first.pid} on {first.host}" in err
    assert (folder / METRICS_FILE).exists()
