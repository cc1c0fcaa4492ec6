"""Ordinary checkpoints of split tables come back whole, or fail when they are loaded and say what
to save instead; never does half a table pass for the whole.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import ValueTable, externalize_tables, find_tables
from memshard.parallel.tables.full_state import full_state_dict
from memshard.parallel.tables.layouts import LayoutName
from memshard.parallel.tables.shard_tables import shard_tables
from memshard.trainer.optim.combined import CombinedOptimizer
from memshard.trainer.optim.rows.adam import RowAdam
from tests.distributed import run_distributed

LAYOUTS: tuple[LayoutName, ...] = ("rows", "columns")


def _build(
    layout: LayoutName | None, seed: int = 0
) -> tuple[nn.Sequential, list[ValueTable], CombinedOptimizer]:
    """Return a model with its tables split (None: hidden, whole), and its optimizer."""
    torch.manual_seed(seed)
    # 25 rows and 6 columns: two processes store unequal numbers of rows.
    memory = ProductKeyMemory(6, keys=5, heads=2, topk=3, key_dim=4, query_norm="layer")
    model = nn.Sequential(nn.Linear(6, 6), memory)
    tables = shard_tables(model, layout=layout) if layout else externalize_tables(model)
    optimizer = CombinedOptimizer(
        AdamW(model.parameters()), RowAdam(tables, lr=0.1, semantics="row-step")
    )
    return model, tables, optimizer


def _train(model: nn.Module, optimizer: CombinedOptimizer) -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _local(model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, Tensor]:
    """Return this process's parts of tables and of what the optimizer keeps for them."""
    ((_, table),) = find_tables(model)
    state = {key: torch.as_tensor(x) for key, x in optimizer.state[table.anchor].items()}
    return {"values": table.weight.clone(), **{key: x.clone() for key, x in state.items()}}


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], case: str) -> None:
    assert actual.keys() == expected.keys()
    different = [key for key in actual if not torch.equal(actual[key], expected[key])]
    assert not different, (case, different)


def _state(model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def _load_distributed(model: nn.Module, optimizer: CombinedOptimizer, folder: Path) -> None:
    # AdamW makes its state in the first step, and only what is there is loaded.
    _train(model, optimizer)
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def _checkpoints(rank: int, world: int, folder: Path) -> dict[str, Any]:
    full = {}
    for layout in LAYOUTS:
        model, _, optimizer = _build(layout)
        _train(model, optimizer)
        trained = _local(model, optimizer)
        full[layout] = full_state_dict(model, optimizer)
        dcp.save(_state(model, optimizer), checkpoint_id=folder / layout)

        # torch.distributed.checkpoint, into another model.
        other, _, its_optimizer = _build(layout, seed=1)
        _load_distributed(other, its_optimizer, folder / layout)
        _assert_same(_local(other, its_optimizer), trained, layout)
        # A state kept in memory.
        again, _, its_optimizer = _build(layout, seed=1)
        again.load_state_dict(model.state_dict())
        its_optimizer.load_state_dict(optimizer.state_dict())
        _assert_same(_local(again, its_optimizer), trained, layout)

        # The first process's file, as trainers write it under DDP.
        if rank == 0:
            torch.save(_state(model, optimizer), folder / f"{layout}.pt")
        dist.barrier()
        saved = torch.load(folder / f"{layout}.pt", weights_only=True)
        other, _, its_optimizer = _build(layout, seed=1)
        if rank:
            with pytest.raises(RuntimeError, match=r"values.*process 1 of 2.*full_state_dict"):
                other.load_state_dict(saved["model"])
            with pytest.raises(ValueError, match=r"process 1 of 2.*full_state_dict"):
                its_optimizer.load_state_dict(saved["optimizer"])
        # A part saved without its place, as earlier versions did.
        part = {
            name: x.to_local() if isinstance(x, DTensor) else x
            for name, x in model.state_dict().items()
        }
        with pytest.raises(RuntimeError, match=r"values.*whole table is 25 x 6.*full_state_dict"):
            other.load_state_dict(part)

    # Written by rows, read by columns.
    model, _, optimizer = _build("columns", seed=1)
    _load_distributed(model, optimizer, folder / "rows")
    resharded = full_state_dict(model, optimizer)
    full["rows, read by columns"] = resharded
    return full


def _check_full(states: Any, expected: Any, case: str) -> None:
    for name, tensor in expected[0].items():
        assert torch.equal(states[0][name], tensor), (case, name)
    for number, entry in expected[1]["state"].items():
        for key, value in entry.items():
            assert torch.equal(
                torch.as_tensor(states[1]["state"][number][key]), torch.as_tensor(value)
            ), (case, number, key)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_of_split_tables_come_back_or_fail(tmp_path: Path) -> None:
    full, _ = run_distributed(_checkpoints, 2, tmp_path)
    _check_full(full["rows, read by columns"], full["rows"], "rows, read by columns")
    for layout in LAYOUTS:
        model, _, optimizer = _build(None, seed=1)
        _load_distributed(model, optimizer, tmp_path / layout)
        _check_full((model.state_dict(), optimizer.state_dict()), full[layout], layout)
        saved = torch.load(tmp_path / f"{layout}.pt", weights_only=True)
        with pytest.raises(RuntimeError, match=r"values.*one process's part.*full_state_dict"):
            model.load_state_dict(saved["model"])
        with pytest.raises(ValueError, match=r"one process's part.*full_state_dict"):
            optimizer.load_state_dict(saved["optimizer"])


def _fsdp(rank: int, world: int) -> tuple[Tensor, Any]:
    model, (table,), _ = _build("rows")
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = CombinedOptimizer(AdamW(model.parameters()), RowAdam([table], lr=0.1))
    _train(model, optimizer)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return table.weight, whole


def test_fsdp2_returns_whole_tables() -> None:
    (first, whole), (second, same) = run_distributed(_fsdp, 2)
    assert torch.equal(whole["1.values.weight"], torch.cat((first, second)))
    assert torch.equal(same["1.values.weight"], whole["1.values.weight"])


def _safetensors(rank: int, world: int, folder: Path) -> bool:
    from safetensors.torch import save_file

    model, _, _ = _build("rows")
    with pytest.raises(RuntimeError):
        save_file(model.state_dict(), folder / "model.safetensors")
    return os.path.exists(folder / "model.safetensors")


def test_safetensors_writes_no_part_of_a_table(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    assert run_distributed(_safetensors, 2, tmp_path) == [False, False]
