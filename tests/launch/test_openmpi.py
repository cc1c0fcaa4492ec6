"""`mpirun` on one host."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memshard.trainer.watch.heartbeat import read_beats
from tests.launch.runs import LONG, wait_for_step
from tests.trainer.tiny_run import assert_same, checkpoint_state

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="not installed: mpirun"),
]


def test_mpirun_passes_a_notice_on(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    mpirun = [
        "mpirun",
        "-np",
        "2",
        "--oversubscribe",
        *(["--allow-run-as-root"] if os.getuid() == 0 else []),
    ]
    command = [
        *mpirun,
        sys.executable,
        "-m",
        "memshard",
        "train",
        str(recipe),
        *LONG,
        "--run",
        str(folder),
    ]
    options = {
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    with subprocess.Popen(command, **options) as first:
        wait_for_step(folder, 30)
        first.send_signal(signal.SIGUSR2)
        said, _ = first.communicate(timeout=120)
    assert first.returncode == 75 and "launcher     OpenMPI" in said and "ranks: 2" in said, said
    assert {beat.ended for beat in read_beats(folder)} == {"stopped"}
    done = subprocess.run(command, **options, timeout=240)
    assert done.returncode == 0, done.stdout
    assert_same(checkpoint_state(folder), checkpoint_state(undisturbed / "long"))
