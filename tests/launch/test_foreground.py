"""How `memshard launch` says what became of a launcher that it waited for."""

import sys
from pathlib import Path

import pytest

from memshard.launch.cli.outcome import Stopped
from memshard.launch.launchers.foreground import run
from memshard.launch.launchers.start import Start


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
