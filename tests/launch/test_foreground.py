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


@pytest.mark.skipif(sys.platform != "linux", reason="the runner is found by /proc")
@pytest.mark.parametrize("name", ["deepspeed", "another"])
def test_ranks_hear_of_a_deepspeed_runner_that_was_killed(tmp_path: Path, name: str) -> None:
    """Of no other program above their parent, which may be a script that has done its work."""
    seconds = 60 if name == "deepspeed" else 4
    watch = (
        "import time; from memshard.launch.orphans import stop_without_parent; "
        f"stop_without_parent(); print(flush=True); time.sleep({seconds}); print('on')"
    )
    below = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {watch!r}])"
    (tmp_path / name).write_text(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {below!r}])"
    )
    with subprocess.Popen([sys.executable, tmp_path / name], stdout=subprocess.PIPE) as runner:
        assert runner.stdout is not None
        runner.stdout.readline()
        runner.kill()
        runner.wait()
        assert runner.stdout.read() == (b"" if name == "deepspeed" else b"on\n")


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found by /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_that_still_save_when_their_launcher_is_gone_are_waited_for(
    tmp_path: Path, number: signal.Signals
) -> None:
    """As under DeepSpeed's launcher, which dies of a signal; else the run would count as failed."""
    rank = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from memshard.trainer.watch.heartbeat import Heartbeat\n"
        "def save(*of):\n"
        "    time.sleep(2)\n"
        "    with Heartbeat(Path(sys.argv[1]), 0, 1, lambda: (7, 'stopped')): pass\n"
        "    os._exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(int(sys.argv[2]), int(sys.argv[3]))\n"
        "time.sleep(60)"
    )
    launcher = (
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {rank!r}, sys.argv[1], str(os.getpid()), "
        f"'{number:d}'])"
    )
    start = Start("recipe.yaml", (), str(tmp_path))
    with pytest.raises(Stopped, match="at step 7, saved"):
        run([sys.executable, "-c", launcher, str(tmp_path)], "", start)
