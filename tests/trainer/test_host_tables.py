"""Tables in host memory: the same training, counted where they lie."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memshard.models.config import MemoryConfig, ModelConfig
from memshard.trainer.config.optimizers import TableOptimizerConfig
from memshard.trainer.config.recipe import DataConfig, Recipe
from memshard.trainer.cost.alternatives import Site, remedies
from memshard.trainer.cost.devices import CARDS
from memshard.trainer.cost.estimate import check_fits, estimate
from tests.distributed import run_distributed
from tests.trainer.tiny_run import checkpoint_state, train_run

HOST = "tables.place=host"


def _in_host_memory(rank: int, world: int, recipe: Path, folder: Path) -> None:
    """Train on two ranks, with half of each table in host memory."""
    train_run(recipe, folder / "run", HOST, "tables.dtype=fp16", stop_at=5)


def test_a_run_may_move_its_tables_out_of_host_memory(recipe: Path, tmp_path: Path) -> None:
    run_distributed(_in_host_memory, 2, recipe, tmp_path)
    train_run(recipe, tmp_path / "run", "tables.dtype=fp16")
    train_run(recipe, tmp_path / "whole", "tables.dtype=fp16")
    ours, theirs = checkpoint_state(tmp_path / "run"), checkpoint_state(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if isinstance(tensor, Tensor):
            torch.testing.assert_close(
                tensor,
                theirs[name],
                rtol=1e-2,
                atol=2e-3,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def test_the_estimate_counts_tables_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(
        vocab_size=100,
        layers=2,
        dim=64,
        memory=MemoryConfig(layers=(1,), keys=256, heads=2, topk=4, key_dim=16),
    )
    beside = Recipe(data=DataConfig(path="", length=64), model=model)
    apart = replace(beside, tables=TableOptimizerConfig(place="host"))
    here, there = estimate(beside, 2, 100), estimate(apart, 2, 100)
    assert not here.host.total and not there.bytes.table and not there.bytes.reads
    assert there.host.table == here.bytes.table == 256**2 // 2 * 64 * 12
    assert there.host.reads == here.bytes.reads and there.bytes.dense == here.bytes.dense
    card = replace(CARDS["v100-16g"], memory=there.bytes.total)
    site = Site(card, ranks=2, vocab_size=100, precision="fp32")
    assert any("tables.place=host" in remedy for remedy in remedies(beside, site))
    # A little less host memory than the table needs.
    available = there.host.table + there.bytes.dense - 1
    monkeypatch.setattr(
        "memshard.trainer.cost.estimate.available_memory",
        lambda device: available if device.type == "cpu" else 1e15,
    )
    with pytest.raises(ValueError, match="the value table needs"):
        check_fits(apart, 2, 100, torch.device("cpu"))
    check_fits(apart, 4, 100, torch.device("cpu"))
