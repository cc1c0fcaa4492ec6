"""The whole state of a model whose tables are split is the state of the same model on one process,
and loads on any number.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.parallel.tables.full_state import full_state_dict, load_full_state_dict
from memshard.parallel.tables.layouts import LayoutName
from memshard.parallel.tables.shard_tables import shard_tables
from memshard.trainer.optim.combined import CombinedOptimizer
from memshard.trainer.optim.rows.adam import RowAdam, Semantics
from tests.distributed import run_distributed


class _Model(nn.Module):
    """Two tables, the first of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = ValueTable(13, 7), ValueTable(2, 7)
        self.again, self.dense = self.a, nn.Linear(7, 7)

    def forward(self, rows: Tensor) -> Tensor:
        ones = torch.ones(rows.shape)
        return self.dense(
            self.a.weighted_sum(rows, ones)
            + self.b.weighted_sum(rows % 2, ones)
            + self.again.weighted_sum(rows, ones)
        )


def _train(
    rank: int, world: int, layout: LayoutName, semantics: Semantics, saved: Any, steps: range
) -> Any:
    model = _Model()
    tables = (
        shard_tables(model, average=False, layout=layout)
        if world > 1
        else externalize_tables(model)
    )
    optimizer = CombinedOptimizer(AdamW(model.parameters()), RowAdam(tables, semantics=semantics))
    if saved:
        load_full_state_dict(model, optimizer, *saved)
    for step in steps:
        rows = torch.randint(13, (12, 3), generator=torch.Generator().manual_seed(step))
        model(torch.chunk(rows, world)[rank]).sum().backward()
        # Only the tables learn, so that nothing but them has to be reduced.
        model.dense.zero_grad()
        optimizer.step()
    return full_state_dict(model, optimizer)


def _tensors(states: Any) -> dict[str, Tensor]:
    model, optimizer = states
    state = {
        f"{number}.{name}": torch.as_tensor(x)
        for number, entry in optimizer["state"].items()
        for name, x in entry.items()
    }
    return {**model, **state}


_CASES: list[tuple[LayoutName, Semantics]] = [
    ("rows", "row-step"),
    ("columns", "row-step"),
    ("columns", "lazy"),
]


def _train_all(rank: int, world: int, saved: list[Any], steps: range) -> list[Any]:
    return [
        _train(rank, world, *case, state, steps) for case, state in zip(_CASES, saved, strict=True)
    ]


def test_full_states_are_those_of_one_process_and_load_on_any_number() -> None:
    nothing = [None] * len(_CASES)
    expected = _train_all(0, 1, nothing, range(3))
    half, *others = run_distributed(_train_all, 3, nothing, range(2))
    assert others == [nothing, nothing]
    on_two, _ = run_distributed(_train_all, 2, half, range(2, 3))
    for actual in (on_two, _train_all(0, 1, half, range(2, 3))):
        for case, states, wanted in zip(_CASES, actual, expected, strict=True):
            assert _tensors(states).keys() == _tensors(wanted).keys()
            for name, tensor in _tensors(wanted).items():
                torch.testing.assert_close(
                    _tensors(states)[name], tensor, rtol=1e-5, atol=1e-6, msg=f"{case}: {name}"
                )


def _refuse(rank: int, world: int) -> None:
    model = _Model()
    shard_tables(model)
    optimizer = AdamW(model.parameters())
    with pytest.raises(ValueError, match="does not hold the table a"):
        full_state_dict(model, optimizer)
    with pytest.raises(ValueError, match="does not hold the table a"):
        load_full_state_dict(model, optimizer, model.state_dict(), optimizer.state_dict())


def test_an_optimizer_without_the_tables_is_refused() -> None:
    run_distributed(_refuse, 2)


def _load_anothers(rank: int, world: int, file: Path) -> None:
    model = nn.ModuleDict({"a": ValueTable(12, 7)})
    shard_tables(model)
    own = copy.deepcopy(model.state_dict())
    if rank == 0:
        torch.save(own, file)
    dist.barrier()
    saved = torch.load(file)
    if rank == 0:
        model.load_state_dict(saved)
    else:
        with pytest.raises(RuntimeError, match=r"a.weight.*process 1 of 2 stores.*full_state_dict"):
            model.load_state_dict(saved)
    model.load_state_dict(own)


def test_another_ranks_part_is_refused(tmp_path: Path) -> None:
    """It has the right shape, and would be read as other rows."""
    run_distributed(_load_anothers, 2, tmp_path / "state.pt")
