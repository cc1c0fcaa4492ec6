import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_plan_of_memory_is_within_a_tenth_of_what_training_takes() -> None:
    """The first two recipes; `python -m memshard.bench.plan_memory` measures all five."""
    command = [
        sys.executable,
        "-m",
        "memshard.bench.plan_memory",
        "--device",
        "cpu",
        "--recipes",
        "2",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
