"""Rows that nobody reads: the log's counts and the list that `memshard eval` writes, against every
single read.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memshard.launch.cli.main import main
from memshard.models.memory.product_key import slot_rows
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.step import train_step
from tests.trainer.test_evaluation import held_out_windows
from tests.trainer.tiny_run import TABLE, numbers, prepare, train_run

FEW_READS = ("model.memory.keys=16", "model.memory.topk=1", "train.batch=1", "tables.dead_after=3")


class _Reads:
    def __init__(self) -> None:
        self.rows: set[int] = set()

    def on_read(self, rows: Tensor, weights: Tensor, counts: Tensor | None = None) -> None:
        self.rows |= set(rows.tolist())


@pytest.mark.parametrize("semantics", ["lazy", "dense"])
def test_the_log_counts_rows_without_reads(semantics: str, recipe: Path, tmp_path: Path) -> None:
    run = prepare(recipe, tmp_path / "watched", *FEW_READS, f"tables.semantics={semantics}")
    assert run.table_optimizer is not None
    (table,) = run.table_optimizer.tables
    steps = []
    for _ in range(7):
        table.observer = reads = _Reads()
        train_step(run)
        steps.append(reads.rows)
    train_run(recipe, tmp_path / "logged", *FEW_READS, f"tables.semantics={semantics}", stop_at=7)
    for key, read in (("never_updated", set.union(*steps)), ("dead", set.union(*steps[-3:]))):
        expected = 1 - len(read) / 256
        assert 0.1 < expected < 0.9
        assert numbers(tmp_path / "logged", f"{TABLE}/{key}")[7] == pytest.approx(expected)
    assert numbers(tmp_path / "logged", f"{TABLE}/dead")[2] == 0


def test_eval_lists_the_slots_that_no_token_reads(recipe: Path, data: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", *FEW_READS, stop_at=2)
    assert (
        main(
            [
                "eval",
                str(tmp_path / "run"),
                "--dead-rows",
                str(tmp_path / "dead.json"),
                "--max-tokens",
                "100",
            ]
        )
        == 0
    )
    loaded = load_model(tmp_path / "run")
    table = next(memory.values for _, memory in loaded.model.memories())
    table.observer = reads = _Reads()
    seen = 0
    with torch.no_grad():
        for inputs, _ in held_out_windows(data):
            inputs = inputs[:, : 100 - seen]
            seen += inputs.shape[1]
            if inputs.numel():
                loaded.model(inputs)
    row = slot_rows(torch.arange(16)[:, None], torch.arange(16), 16).tolist()
    slots = [i1 * 16 + i2 for i1 in range(16) for i2 in range(16) if row[i1][i2] not in reads.rows]
    assert 10 < len(slots) < 250
    assert json.loads((tmp_path / "dead.json").read_text()) == {TABLE: slots}
