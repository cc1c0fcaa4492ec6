"""Experiments go on where they stopped, and their workers end with them."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memshard.experiments.common import catalogue
from memshard.experiments.common.run import RESULTS_FILE, reproduce
from memshard.launch.cli.main import main
from memshard.lock import holding


def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path: Path) -> None:
    name, said = "fast_weights/capacity", []
    whole = reproduce(name, "smoke", tmp_path, say=said.append)
    results = tmp_path / RESULTS_FILE
    lines = results.read_text().splitlines()
    results.write_text(lines[0] + "\n" + lines[1][:40])
    again = reproduce(name, "smoke", tmp_path, say=said.append)
    assert "2 points, 1 to run" in " ".join(said)
    assert [row["result"] for row in again["points"]] == [row["result"] for row in whole["points"]]
    assert {"result.json", "report.md", "capacity.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_a_damaged_or_busy_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "fast_weights/capacity", "--scale", "smoke", "--out", str(tmp_path)]
    results = tmp_path / RESULTS_FILE
    results.write_text('{"key": "a", "point": {}}\n{"key": \n')
    assert main(command) == 2
    assert f"{results}, line 2: not JSON" in capsys.readouterr().err
    results.unlink()
    with holding(tmp_path, "wait"):
        assert main(command) == 2
    assert "is in use by process" in capsys.readouterr().err


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "memshard",
        "reproduce",
        "fast_weights/capacity",
        "--scale",
        "full",
        "--workers",
        "1",
    ]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as parent:

        def children() -> list[str]:
            return Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()

        _until(lambda: len(children()) == 2)
        workers = children()
        parent.kill()
    _until(lambda: not any(Path("/proc", worker).exists() for worker in workers))


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("name", catalogue.names())
def test_points_are_distinct_and_as_json_has_them(name: str) -> None:
    experiment = catalogue.find(name)
    for scale in catalogue.SCALES:
        texts = [json.dumps(point, sort_keys=True) for point in experiment.points(scale)]
        assert len(set(texts)) == len(texts) > 0
    assert json.loads(texts[0]) == experiment.points("full")[0]


def test_an_unknown_experiment_names_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "fast_weights/capacty"]) == 2
    assert "fast_weights/capacity" in capsys.readouterr().err
