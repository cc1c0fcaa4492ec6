"""Tables that several processes have are split, kept alike or refused; they never drift apart in
silence.
"""

import io
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.parallel.tables.shard_tables import shard_tables
from memshard.trainer.optim.rows.adam import RowAdam
from tests.distributed import run_distributed


def _model() -> torch.nn.ModuleList:
    torch.manual_seed(0)
    return torch.nn.ModuleList([ValueTable(6, 4)])


def _step(tables: list[ValueTable], rows: Tensor, alone: bool = False) -> Tensor:
    """Return the tables' content after a step on some rows."""
    optimizer = RowAdam(tables, lr=0.1, alone=alone)
    (table,) = tables
    table.weighted_sum(rows, torch.ones(rows.shape)).square().mean().backward()
    optimizer.step()
    return table.weight


def _body(rank: int, world: int) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([[0, 1], [2, 3]])
    mine = rows[rank : rank + 1]
    with pytest.raises(RuntimeError, match=r"2 processes.*shard_tables\(model\).*alone=True"):
        _step(externalize_tables(_model()), mine)
    local = _step(externalize_tables(_model()), mine, alone=True)
    copies = _model()
    alone, _ = dist.new_subgroups(1)
    assert alone is not None
    return local, _step(shard_tables(copies, alone, replicas=dist.group.WORLD), mine)


def test_several_processes_with_unsplit_tables_are_refused() -> None:
    (first, one_copy), (second, other_copy) = run_distributed(_body, 2)
    assert not torch.equal(first, second)
    assert torch.equal(one_copy, other_copy)
    expected = _step(externalize_tables(_model()), torch.tensor([[0, 1], [2, 3]]))
    torch.testing.assert_close(one_copy, expected)


def _one_process(rank: int, world: int) -> Tensor:
    return _step(externalize_tables(_model()), torch.tensor([[0, 1]]))


def _wrapped_first(rank: int, world: int) -> None:
    wrapped = DistributedDataParallel(_model())
    for hide in (externalize_tables, shard_tables):
        with pytest.raises(ValueError, match="hide or split tables before it wraps the model"):
            hide(wrapped)
    sharded = _model()
    fully_shard(sharded[0])
    first = FullyShardedDataParallel(_model(), device_id=torch.device("cpu"), use_orig_params=True)
    for model in (sharded, first):
        for hide in (externalize_tables, shard_tables):
            with pytest.raises(
                ValueError, match="hide or split tables before FSDP wraps the model"
            ):
                hide(model)


def _split_twice(rank: int, world: int) -> None:
    model = _model()
    tables = shard_tables(model)
    with pytest.raises(ValueError, match="split already"):
        shard_tables(model)
    assert externalize_tables(model) == tables


def _alone(rank: int, world: int) -> None:
    model = _model()
    tables = shard_tables(model, dist.new_group(timeout=timedelta(seconds=1)))
    with pytest.raises(TypeError, match=r"pickled whole.*save full_state_dict"):
        torch.save(model, io.BytesIO())
    if rank == 0:
        with pytest.raises(RuntimeError) as raised, torch.no_grad():
            tables[0].weighted_sum(torch.tensor([[0, 1]]), torch.ones(1, 2))
        assert "in evaluation as well" in raised.value.__notes__[0]
    dist.barrier()


def test_what_split_tables_cannot_do_is_explained() -> None:
    """Be pickled whole, and be read by one process alone, as in evaluation on the first."""
    run_distributed(_alone, 2)


def test_tables_are_split_once() -> None:
    """A part would be split again."""
    run_distributed(_split_twice, 2)


def test_tables_that_a_wrapper_has_taken_are_refused() -> None:
    """Not first in the wrapper's words, in the second step."""
    run_distributed(_wrapped_first, 1)


def test_a_group_of_one_process_needs_no_split_tables() -> None:
    (weight,) = run_distributed(_one_process, 1)
    assert torch.equal(weight, _one_process(0, 1))


def test_splitting_tables_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group first"):
        shard_tables(_model())
