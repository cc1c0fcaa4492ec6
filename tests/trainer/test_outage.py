"""A store of data that is away for longer than reads are retried: the run stops, on all ranks
alike, and goes on later as if nothing had happened.
"""

import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from memshard.data_pipeline import fetch
from memshard.data_pipeline.format import remote
from memshard.launch.cli.main import main
from memshard.trainer.loop import train
from tests.data_pipeline.range_server import serving
from tests.distributed import run_distributed
from tests.trainer.tiny_run import assert_same, checkpoint_state, prepare, train_run


def fetch_at_every_step(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small data set be read as a large one: in blocks that the cache does not keep."""
    monkeypatch.setenv("MEMSHARD_CACHE", str(cache))
    monkeypatch.setenv("MEMSHARD_CACHE_BYTES", "1")
    monkeypatch.setattr(remote, "BLOCK_BYTES", 512)
    monkeypatch.setattr(remote, "BLOCKS_IN_MEMORY", 1)
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.01)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_outage_stops_a_run_that_resumes_as_if_nothing_had_happened(
    data: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    fetch_at_every_step(tmp_path / "cache", monkeypatch)
    with serving(data) as server:
        words = [f"data.path={server.url}", f"data.workers={workers}"]
        command = ["train", str(recipe), *words, "--run", str(tmp_path / "run")]
        server.ranges_left = 60
        assert main(command) == 75
        error = capsys.readouterr().err
        assert "data cannot be read" in error and "HTTP Error 503" in error
        assert "resume with: memshard train" in error and "Traceback" not in error
        assert 0 < checkpoint_state(tmp_path / "run")["progress"]["step"] < 10
        server.refuse["index.json"] = 10**6
        assert main(command) == 75, "a resume while the store is still away"
        assert "the same command resumes the run" in capsys.readouterr().err
        assert main([*command[:-1], str(tmp_path / "new")]) == 2, "perhaps the address is wrong"
        server.refuse.clear()
        server.ranges_left = None
        assert main(command) == 0
        train_run(recipe, tmp_path / "whole", *words)
    assert_same(checkpoint_state(tmp_path / "run"), checkpoint_state(tmp_path / "whole"))


def test_an_outage_during_an_evaluation_stops_the_run(
    data: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_at_every_step(tmp_path / "cache", monkeypatch)
    with serving(data) as server:
        run = prepare(recipe, tmp_path / "run", f"data.path={server.url}", "train.eval_every=4")
        server.refuse["heldout-00000.tar"] = 1000
        result = train(run)
    assert result["step"] == 4 and not result["finished"] and "heldout" in result["outage"]


def lose_the_network_on_rank1(
    rank: int, ranks: int, recipe: Path, folder: Path, url: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        fetch_at_every_step(folder / f"cache{rank}", monkeypatch)
        run = prepare(recipe, folder / "run", f"data.path={url}")
        train(run, stop_at=3)
        if rank == 1:
            # Of a proxy where nobody listens.
            monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
            urllib.request.install_opener(None)
        stopped = train(run)
        os.environ.pop("http_proxy", None)
        urllib.request.install_opener(None)
        return stopped, train_run(recipe, folder / "run", f"data.path={url}")


def test_an_outage_on_one_rank_stops_all_alike(data: Path, recipe: Path, tmp_path: Path) -> None:
    with serving(data) as server:
        results = run_distributed(lose_the_network_on_rank1, 2, recipe, tmp_path, server.url)
        train_run(recipe, tmp_path / "whole", f"data.path={data}")
    reasons = []
    for stopped, resumed in results:
        assert (stopped["step"], stopped["finished"]) == (3, False)
        assert (resumed["step"], resumed["finished"]) == (10, True)
        reasons.append(stopped["outage"])
    assert "1 other ranks could not read" in reasons[0] and "tried 5 times" in reasons[1]
    state = checkpoint_state(tmp_path / "run")
    assert state["progress"]["step"] == 10
    assert state["progress"] == checkpoint_state(tmp_path / "whole")["progress"] | {
        "losses": state["progress"]["losses"]
    }
