"""Tables that are split beside weights that FSDP2 shards learn as dense Adam's."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Adam, Optimizer

from memshard.models.memory.product_key import ProductKeyMemory
from memshard.parallel.tables.shard_tables import shard_tables
from memshard.trainer.optim.combined import CombinedOptimizer
from memshard.trainer.optim.rows.adam import RowAdam
from tests.distributed import run_distributed


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    memory = ProductKeyMemory(6, keys=4, heads=2, topk=2, key_dim=8, query_norm="layer")
    return nn.Sequential(nn.Linear(6, 6), memory).double()


def _batches(world: int) -> Tensor:
    """Return [steps, micro-batches, ranks, tokens, 6]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, world, 5, 6, dtype=torch.float64, generator=generator)


def _scale(*optimizers: Optimizer) -> None:
    """Scale all gradients, as clipping after a micro-batch does."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad.mul_(0.3)


def _sharded(rank: int, world: int) -> Tensor:
    model = _model()
    (table,) = shard_tables(model)
    fully_shard(model)
    dense, rows = Adam(model.parameters(), 1e-2), RowAdam([table], 1e-2, semantics="dense")
    optimizer = CombinedOptimizer(dense, rows)
    for step in _batches(world):
        for tokens in step:
            model(tokens[rank]).square().mean().backward()
            _scale(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    whole = table.as_whole(table.weight)
    assert isinstance(whole, DTensor)
    return whole.full_tensor()


def _apart(rank: int, world: int) -> None:
    model = _model()
    tables = shard_tables(model)
    fully_shard(model)
    dense, rows = Adam(model.parameters()), RowAdam(tables)
    model(_batches(world)[0, 0, rank]).square().mean().backward()
    _scale(dense, rows)
    with pytest.raises(RuntimeError, match="CombinedOptimizer"):
        model(_batches(world)[0, 1, rank])


def _held_back(rank: int, world: int) -> None:
    model = _model()
    tables = shard_tables(model)
    # Gradients of another dtype than the weights' are summed where only FSDP2 sees them.
    fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    model.set_requires_gradient_sync(False)
    optimizer = CombinedOptimizer(Adam(model.parameters()), RowAdam(tables))
    model(_batches(world)[0, 0, rank]).square().mean().backward()
    model(_batches(world)[0, 1, rank]).square().mean().backward()
    assert len(tables[0].reads) == 2
    _scale(optimizer)
    with pytest.raises(RuntimeError, match="scale after the last micro-batch"):
        model(_batches(world)[0, 2, rank])


def test_gradients_that_are_scaled_after_each_micro_batch_count() -> None:
    """FSDP2 hides from a layer that its weights have gradients."""
    model = _model()
    optimizer = Adam(model.parameters(), 1e-2)
    for step in _batches(2):
        for tokens in step:
            (sum(model(x).square().mean() for x in tokens) / 2).backward()
            _scale(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    expected = model.state_dict()["1.values.weight"]
    for whole in run_distributed(_sharded, 2):
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12)


def test_optimizers_apart_are_refused_where_reads_would_be_lost() -> None:
    run_distributed(_apart, 2)


def test_gradients_that_fsdp_holds_back_are_not_taken_for_those_of_a_skipped_step() -> None:
    run_distributed(_held_back, 2)
