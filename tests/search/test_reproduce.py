"""Experiments of papers: they go on where they stopped, and find what the paper found."""

import json
from pathlib import Path

import pytest

from memshard.launch.cli.main import main
from memshard.search.reproduce import catalogue
from memshard.search.reproduce.retrieval import train
from memshard.search.reproduce.run import RESULTS_FILE, reproduce


def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path: Path) -> None:
    name, said = "fast_weights/capacity", []
    whole = reproduce(name, "smoke", tmp_path, say=said.append)
    results = tmp_path / RESULTS_FILE
    lines = results.read_text().splitlines()
    results.write_text(lines[0] + "\n" + lines[1][:40])
    again = reproduce(name, "smoke", tmp_path, say=said.append)
    assert "2 points, 1 to run" in " ".join(said)
    assert [row["result"] for row in again["points"]] == [row["result"] for row in whole["points"]]
    assert {"result.json", "report.md", "capacity.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", catalogue.names())
def test_points_are_distinct_and_as_json_has_them(name: str) -> None:
    experiment = catalogue.find(name)
    for scale in catalogue.SCALES:
        texts = [json.dumps(point, sort_keys=True) for point in experiment.points(scale)]
        assert len(set(texts)) == len(texts) > 0
    assert json.loads(texts[0]) == experiment.points("full")[0]


def test_the_delta_rule_updates_what_the_sum_rule_only_adds_to() -> None:
    """Figure 3: published losses after 300 steps are 0.0065 and, for the sum rule, a plateau of 0.1."""
    point = {"symbols": 20, "features": "dpfp-1", "replace": True, "steps": 300, "seed": 1}
    assert train(point | {"rule": "delta"})["loss"] < 0.02 < 0.07 < train(point | {"rule": "sum"})["loss"]


def test_an_unknown_experiment_names_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "fast_weights/capacty"]) == 2
    assert "fast_weights/capacity" in capsys.readouterr().err
