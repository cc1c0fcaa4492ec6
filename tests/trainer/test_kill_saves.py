"""kill -9 of one rank or of all, at random moments of a run of two processes that saves
after each step.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memshard.trainer.checkpoint.folders import committed
from memshard.trainer.checkpoint.hashed_pieces import verify
from memshard.trainer.checkpoint.index import read_index
from memshard.trainer.checkpoint.save_load import check_files
from tests.trainer.tiny_run import assert_same, checkpoint_state, numbers

KILLS = 30
SETTINGS = ("train.save_every=1", "train.micro_batch=2", "guards.timeout=20")


def _start(recipe: Path, folder: Path, steps: int) -> list["subprocess.Popen[bytes]"]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "memshard",
        "train",
        str(recipe),
        "--run",
        str(folder),
        *SETTINGS,
        f"train.steps={steps}",
    ]
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    null = subprocess.DEVNULL
    return [
        subprocess.Popen(command, env={**common, "RANK": str(rank)}, stdout=null, stderr=null)
        for rank in (0, 1)
    ]


def _finish(processes: list["subprocess.Popen[bytes]"], timeout: float) -> None:
    try:
        for process in processes:
            process.wait(timeout)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _phase(checkpoints: Path) -> str:
    """Return what a kill has interrupted, by what it left."""
    if list(checkpoints.glob("*.partial/COMMITTED")):
        return "before the rename, or while an old one was removed"
    if list(checkpoints.glob("*.partial/index.json")):
        return "before the marker"
    if list(checkpoints.glob("*.partial")):
        return "while tensors were written"
    return "between saves"


@pytest.mark.slow
def test_thirty_kills_cost_no_checkpoint_and_no_step(recipe: Path, tmp_path: Path) -> None:
    draw, checkpoints = random.Random(0), tmp_path / "run/checkpoints"
    newest, phases = 0, []
    for number in range(KILLS):
        processes = _start(recipe, tmp_path / "run", 1_000_000)
        deadline = time.monotonic() + 120
        # At least one save of this start, then any moment of the next few.
        while (
            len(committed(checkpoints)) == 0 or int(committed(checkpoints)[-1].name[5:]) <= newest
        ):
            assert time.monotonic() < deadline and all(
                process.poll() is None for process in processes
            )
            time.sleep(0.002)
        time.sleep(draw.random() * 0.5)
        victims = [processes, processes[:1], processes[1:]][number % 3]
        for process in victims:
            process.send_signal(signal.SIGKILL)
        _finish(processes, 60)
        phases.append(_phase(checkpoints))
        saved = committed(checkpoints)
        for folder in saved:
            check_files(folder)
            verify(folder, read_index(folder))
        assert len(saved) >= 2 or number == 0
        assert int(saved[-1].name[5:]) > newest
        newest = int(saved[-1].name[5:])
    print(
        f"{newest} steps; kills hit: "
        f"{ {phase: phases.count(phase) for phase in sorted(set(phases))} }"
    )
    assert len(set(phases)) > 1, phases

    for folder in (tmp_path / "run", tmp_path / "whole"):
        finished = _start(recipe, folder, newest + 3)
        _finish(finished, 600)
        assert [process.returncode for process in finished] == [0, 0]
    assert_same(checkpoint_state(tmp_path / "run"), checkpoint_state(tmp_path / "whole"))
    assert numbers(tmp_path / "run", "train/loss") == numbers(tmp_path / "whole", "train/loss")
