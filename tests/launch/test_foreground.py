"""How `memshard launch` says what became of a launcher that it waited for."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memshard.launch.cli.outcome import Stopped
from memshard.launch.launchers.foreground import run
from memshard.launch.launchers.start import Start
from memshard.launch.orphans import LAUNCHER


def test_a_start_that_fails_is_not_taken_for_the_one_that_was_stopped_before(
    tmp_path: Path,
) -> None:
    """A scheduler that starts a stopped run again would do so without end."""
    beat = (
        "import sys; from pathlib import Path; "
        "from memshard.trainer.watch.heartbeat import Heartbeat\n"
        "with Heartbeat(Path(sys.argv[1]), 0, 1, lambda: (7, 'stopped')): pass\n"
        "sys.exit(75)"
    )
    start = Start("recipe.yaml", (), str(tmp_path))
    with pytest.raises(Stopped, match="at step 7, saved"):
        run([sys.executable, "-c", beat, str(tmp_path)], "", start)
    with pytest.raises(RuntimeError, match="the launcher ended with exit code 2"):
        run([sys.executable, "-c", "import sys; sys.exit(2)"], "", start)


def test_ranks_hear_of_a_launcher_that_was_killed_above_their_parent() -> None:
    """As under DeepSpeed's launcher, whose processes between the two go on."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as launcher:
        watch = (
            "import time; from memshard.launch.orphans import stop_without_parent; "
            "stop_without_parent(); print(flush=True); time.sleep(60)"
        )
        environment = os.environ | {LAUNCHER: str(launcher.pid)}
        with subprocess.Popen(
            [sys.executable, "-c", watch], env=environment, stdout=subprocess.PIPE
        ) as rank:
            assert rank.stdout is not None
            rank.stdout.readline()
            assert rank.poll() is None
            launcher.kill()
            launcher.wait()
            assert rank.wait(30) == -signal.SIGTERM
