"""Training on two ranks is training on one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from memshard.models.loss import token_losses
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import externalize_tables, find_tables
from memshard.parallel.apply import apply
from memshard.parallel.mesh import build_mesh
from memshard.parallel.tables.shard_tables import shard_tables
from memshard.trainer.optim.combined import CombinedOptimizer
from memshard.trainer.optim.rows.adam import RowAdam
from tests.distributed import run_distributed
from tests.models.tiny import tiny_config, tiny_model, tiny_tokens

_MEMORIES: list[dict[str, Any]] = [
    {"share": True},
    {"share": False, "gate": True, "value_dim": 7},
    {"query_norm": "lagged"},
    {"kind": "peer", "share": True},
]


def _train_transformer(rank: int, world: int, memory: dict[str, Any]) -> list[float]:
    """Return losses of 10 steps of a batch of 4 texts, unevenly spread, summed over ranks."""
    model = tiny_model(tiny_config(memory))
    apply(model, build_mesh("cpu"))
    dense = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = CombinedOptimizer(
        dense, RowAdam([table for _, table in find_tables(model)], lr=0.01)
    )
    mine = slice(0, 4) if world == 1 else (slice(0, 3), slice(3, 4))[rank]
    losses = []
    for step in range(10):
        tokens = tiny_tokens(4, 9, seed=step % 3)[mine]
        optimizer.zero_grad()
        loss = token_losses(model(tokens)[0][:, :-1], tokens[:, 1:]).sum() / 32
        loss.backward()
        total = loss.detach().clone()
        if world > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            dist.all_reduce(total)
        optimizer.step()
        losses.append(total.item())
    return losses


def _build(hidden: bool) -> nn.Module:
    torch.manual_seed(0)
    memory = ProductKeyMemory(6, keys=5, heads=2, topk=3, key_dim=4, query_norm="layer")
    model = nn.Sequential(nn.Linear(6, 6), memory, nn.Linear(6, 1)).double()
    if hidden:
        externalize_tables(model)
    return model


def _train_ddp(rank: int, world: int, hidden: bool) -> dict[str, Tensor]:
    """Return the state after 5 steps on a batch of 8, each rank's loss a mean over its own half.
    hidden: table sharded, row-sparse Adam.
    """
    model = _build(hidden=hidden and world == 1)
    tables = (
        shard_tables(model) if hidden and world > 1 else [table for _, table in find_tables(model)]
    )
    parallel = DistributedDataParallel(model) if world > 1 else model
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    if hidden:
        optimizer = CombinedOptimizer(optimizer, RowAdam(tables, lr=0.02))
    for step in range(5):
        x = torch.randn(
            8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
        ).chunk(world)[rank]
        optimizer.zero_grad()
        (parallel(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    return {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }


def _body(rank: int, world: int) -> dict[str, Any]:
    return {
        "transformer": [_train_transformer(rank, world, memory) for memory in _MEMORIES],
        "ddp": {hidden: _train_ddp(rank, world, hidden) for hidden in (False, True)},
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_distributed(_body, 2)


@pytest.mark.parametrize("index", range(len(_MEMORIES)), ids=[str(memory) for memory in _MEMORIES])
def test_a_transformer_with_batch_statistics_and_sharded_tables(
    index: int, two_ranks: list[dict[str, Any]]
) -> None:
    losses = _train_transformer(0, 1, _MEMORIES[index])
    assert losses[9] < losses[0]
    for rank in two_ranks:
        torch.testing.assert_close(rank["transformer"][index], losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("hidden", [False, True], ids=["visible table", "sharded table"])
def test_plain_ddp(hidden: bool, two_ranks: list[dict[str, Any]]) -> None:
    expected = _train_ddp(0, 1, hidden)
    states = [rank["ddp"][hidden] for rank in two_ranks]
    for name, tensor in expected.items():
        pieces = [state[name] for state in states]
        if hidden and "values" in name:
            pieces = [torch.cat(pieces)]
        for piece in pieces:
            torch.testing.assert_close(piece, tensor, rtol=1e-9, atol=1e-12, msg=name)
