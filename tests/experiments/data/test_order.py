"""Order of sequences as an experiment: arrangements of one text, a cut corpus, the report."""

from pathlib import Path
from typing import Any

import pytest
import torch

from memshard.data_pipeline.format.index import load_index
from memshard.data_pipeline.format.verify import verify_data
from memshard.data_pipeline.stream import TrainStream
from memshard.experiments.common import catalogue
from memshard.experiments.data import runs
from memshard.experiments.data.arrangements import (
    BURST,
    BURSTS,
    PERMUTED,
    open_arranged,
    repeats,
    token_shares,
)
from memshard.trainer.config.load import load_recipe
from tests.data_pipeline.conftest import write_numbered

LENGTH, BATCH, STEPS = 8, 4, 40


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """A data folder whose tokens are 1, 2, 3 and so on, in documents of 100."""
    write_numbered(tmp_path / "data", [100] * 60)
    return str(tmp_path / "data")


def test_permuted_has_the_sequences_of_contiguous_in_other_steps(numbered: str) -> None:
    same = open_arranged(numbered, LENGTH, BATCH, 0, STEPS, "contiguous")
    other = open_arranged(numbered, LENGTH, BATCH, 0, STEPS, PERMUTED)
    count = STEPS * BATCH
    one, permuted = same.batch(0, count).inputs, other.batch(0, count).inputs
    assert sorted(one[:, 0].tolist()) == sorted(permuted[:, 0].tolist())
    assert (one[:, 0] == permuted[:, 0]).sum() < count / 10
    assert torch.equal(other.batch(17, 5).inputs, permuted[17:22])


def test_bursts_go_on_for_some_steps_and_jump(numbered: str) -> None:
    stream = open_arranged(numbered, LENGTH, BATCH, 0, STEPS, BURSTS)
    first = stream.batch(0, STEPS * BATCH).inputs[:, 0].reshape(STEPS, BATCH)
    # The next sequence of a lane is the next in its document, or in the document that follows.
    contiguous = TrainStream(numbered, LENGTH, BATCH, 0)
    whole = contiguous.batch(0, contiguous.samples_per_epoch).inputs[:, 0].reshape(-1, BATCH)
    for lane in range(BATCH):
        places = [whole[:, lane].tolist().index(token) for token in first[:, lane].tolist()]
        jumps = [step for step in range(1, STEPS) if places[step] != places[step - 1] + 1]
        assert jumps and all(step % BURST == 0 for step in jumps)
        assert len(set(places)) == STEPS


def test_repeats_tell_bursts_from_none(numbered: str) -> None:
    """All tokens are rare here; a step shares one with the step before, where lanes go on: the last
    target of a sequence is the first input of the next.
    """
    shares = token_shares(numbered)
    facts = {
        name: repeats(open_arranged(numbered, LENGTH, BATCH, 0, STEPS, name), STEPS, BATCH, shares)
        for name in ("contiguous", "shuffled")
    }
    assert all(of["again_1"] == of["again_10"] == 0 for of in facts.values())
    assert facts["contiguous"]["documents"] < facts["shuffled"]["documents"] <= 60


def test_a_cut_corpus_has_documents_from_everywhere_and_the_held_out_text(
    numbered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = runs.cut_corpus(numbered, 2000)
    index, source = load_index(out), load_index(numbered)
    assert index.splits["train"].tokens == 2000 and verify_data(out)
    assert index.splits["heldout"] == source.splits["heldout"]
    inputs = TrainStream(out, 100, 1, 0, order="best-fit").batch(0, 20).inputs
    assert sorted(inputs[:, 0].tolist()) == [300 * document + 1 for document in range(20)]
    before = (out / "index.json").stat().st_mtime_ns
    assert runs.cut_corpus(numbered, 2000) == out
    assert (out / "index.json").stat().st_mtime_ns == before


def test_full_goes_on_where_small_ends() -> None:
    experiment = catalogue.find("data/order")
    small, full = (experiment.points(scale) for scale in ("small", "full"))
    assert full[: len(small)] == small
    trained = [point for point in full if "probe" not in point]
    assert all(load_recipe(point["recipe"], point["overrides"]) for point in trained[:40])
    assert len({str(point) for point in full}) == len(full)


def test_the_report_compares_each_order_at_its_best_rate(tmp_path: Path) -> None:
    def run(arrangement: str, lr: float, seed: int, loss: float) -> tuple[dict[str, Any], Any]:
        point = {"text": "long", "cut": None, "memory": False, "seed": seed, "lr": lr}
        curve = [(50, loss + 1), (100, loss)]
        found = {"loss": loss, "curve": curve, "training": 4.0, "epochs": 0.1}
        updates = {"update_rare": 0.5, "update_frequent": 0.25}
        return {**point, "arrangement": arrangement}, found | updates

    streams = {"documents": 7, "rare": 3.0, "again_1": 0.5, "again_10": None}
    rows = [
        ({"probe": "streams", "text": "long", "cut": None}, None),
        run("contiguous", 1e-3, 0, 5.0),
        run("contiguous", 3e-3, 0, 4.9),
        run("contiguous", 3e-3, 1, 4.8),
        run("shuffled", 1e-3, 0, 4.6),
        run("shuffled", 3e-3, 0, 4.7),
        run("shuffled", 1e-3, 1, 4.6),
    ]
    rows[0] = rows[0][0], {"documents": 9, "tokens": 90, "arrangements": {"contiguous": streams}}
    report = catalogue.find("data/order").report(rows, tmp_path)
    assert "| long | contiguous | 0.10 | 5.000 | **4.850 +- 0.071** |" in report
    assert "| long | shuffled | 0.10 | **4.600 +- 0.000** | 4.700 |" in report
    assert "| long | shuffled | 0.003, 0.001 | +0.250 +- 0.071 | +0.000 +- 0.000 |" in report
    assert "| long | contiguous | 7 of 9 | 50.0 % |  | 0.500 | 0.250 |" in report
    assert (tmp_path / "order.png").exists()
