"""`memshard plan` knows the memory of a training step."""

import json

import pytest

from memshard.launch.cli.main import main


@pytest.mark.slow
def test_a_plan_of_memory_is_within_a_tenth_of_what_training_takes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """This measures the first two recipes; `memshard bench plan-memory` measures all seven."""
    command = ["bench", "plan-memory", "--device", "cpu", "--recipes", "2", "--json"]
    assert main(command) == 0
    rows = json.loads(capfd.readouterr().out)
    assert len(rows) == 2
    for name, row in rows.items():
        assert abs(row["estimated"] / row["measured"] - 1) <= 0.1, (name, row)
