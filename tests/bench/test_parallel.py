"""`memshard bench parallel` and `plain-loop` measure what they say."""

import json
from pathlib import Path

import pytest

from memshard.launch.cli.main import main
from tests.trainer.conftest import data  # noqa: F401

TINY = [
    "--layers",
    "2",
    "--dim",
    "16",
    "--heads",
    "2",
    "--length",
    "16",
    "--batch",
    "4",
    "--rounds",
    "1",
]


def _in_order(spread: dict[str, float]) -> bool:
    return 0 < spread["low"] <= spread["median"] <= spread["high"]


def test_both_splits_and_both_blocks(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "parallel", *TINY, "--keys", "4", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [(point["tensor"], point["data"]) for point in result["steps"]] == [(1, 2), (2, 1)]
    whole, split = result["steps"]
    assert split["dense_bytes"] < whole["dense_bytes"] and split["sent_bytes"] > 0
    assert {"torch", "torch, ZeRO-1"} <= set(result["engines_s"])
    # Both spread the same block: the gradient of its input is the same.
    assert len(result["blocks_s"]) == 2 and result["blocks_difference"] < 1e-5
    assert all(_in_order(point["step_s"]) for point in result["steps"])
    assert all(_in_order(seconds) for seconds in result["engines_s"].values())
    assert _in_order(result["check_s"])


def test_the_plain_loop_has_the_same_model(
    data: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "plain-loop", str(data), *TINY, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert set(result) == {"memshard train", "plain loop", "memshard / plain"}
    assert all(_in_order(rate) for rate in result.values())


def test_n_grams_are_measured_against_a_model_without(
    data: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    sizes = "--rows", "20,40", "--value-dim", "4"
    assert main(["bench", "ngram", str(data), *TINY, *sizes, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    small, large = result["tables"].values()
    assert small["slots"] < large["slots"]
    assert _in_order(small["training"]) and _in_order(large["inference"])


def test_nothing_to_measure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "parallel", "--ranks", "1"]) == 2
    assert "memshard bench plain-loop" in capsys.readouterr().err
    assert main(["bench", "parallel", "--layers", "0"]) == 2
    assert "--layers is 0; it must be at least 1" in capsys.readouterr().err
    assert main(["bench", "data"]) == 2
    assert "name a data folder" in capsys.readouterr().err
