"""`memshard bench parallel` measures what it says."""

import json
from pathlib import Path

import pytest

from memshard.launch.cli.main import main
from tests.trainer.conftest import data  # noqa: F401

TINY = "--layers 2 --dim 16 --heads 2 --length 16 --batch 4 --keys 4 --rounds 1".split()


def test_both_splits_both_blocks_and_the_plain_loop(
    data: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "parallel", *TINY, "--data", str(data), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [(point["tensor"], point["data"]) for point in result["steps"]] == [(1, 2), (2, 1)]
    whole, split = result["steps"]
    assert split["dense_bytes"] < whole["dense_bytes"] and split["sent_bytes"] > 0
    assert {"torch", "torch, ZeRO-1"} <= set(result["engines_s"])
    # Both spread the same block: the gradient of its input is the same.
    assert len(result["blocks_s"]) == 2 and result["blocks_difference"] < 1e-5
    found = [
        *(point["step_s"] for point in result["steps"]),
        *result["engines_s"].values(),
        *result["tokens_per_s"].values(),
    ]
    assert all(0 < one["low"] <= one["median"] <= one["high"] for one in found)


def test_nothing_to_measure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "parallel", "--ranks", "1"]) == 2
    assert "--data" in capsys.readouterr().err
