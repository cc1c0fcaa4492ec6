"""What memories exchange in backward has a process group of its own beside DDP's."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from memshard.models.loss import token_losses
from memshard.models.memory.table import ValueTable
from memshard.parallel.collectives import set_timeout
from memshard.parallel.mesh import build_mesh
from memshard.parallel.tables.shard_tables import shard_tables
from memshard.parallel.tables.sharded import ShardedTable
from memshard.trainer.training import build_for_training
from memshard.trainer.watch.lost_ranks import is_collective_error
from tests.distributed import run_distributed
from tests.models.tiny import tiny_config, tiny_tokens


def _groups_in_backward(rank: int, world: int, memory: int | None) -> tuple[set[Any], set[Any]]:
    """Return the groups of DDP's buckets and of all else that a backward pass sends, and let rank 0
    read alone in the end.
    """
    training = build_for_training(tiny_config({}), mesh=build_mesh("cpu", memory), layout="columns")
    buckets, rest = set[Any](), set[Any]()
    with pytest.MonkeyPatch.context() as names:

        def noted(send: Any, *args: Any, **kwargs: Any) -> Any:
            group = kwargs["group"] or dist.group.WORLD
            (buckets if kwargs.get("async_op") else rest).add(group.group_name)
            return send(*args, **kwargs)

        for name in ("all_reduce", "all_to_all_single"):
            names.setattr(dist, name, partial(noted, getattr(dist, name)))
        tokens = tiny_tokens(2, 9)
        logits = training.engine.model(tokens)[0]
        buckets.clear()
        rest.clear()
        training.engine.backward(token_losses(logits[:, :-1], tokens[:, 1:]).sum(), 1.0)
    set_timeout(1)
    if rank == 0:
        with pytest.raises(RuntimeError) as raised, torch.no_grad():
            training.model(tokens)
        assert is_collective_error(raised.value)
    set_timeout(60)
    (table,) = shard_tables(nn.Sequential(ValueTable(slots=8, dim=2)))
    assert isinstance(table, ShardedTable) and table.group is not dist.group.WORLD
    return buckets, rest


@pytest.mark.parametrize("memory", [None, 1])
def test_memories_do_not_queue_behind_dense_gradients(memory: int | None) -> None:
    """Also with whole tables, whose queries are normalised over all ranks. The group has the run's
    timeout, an error that names a collective, and ends with the others.
    """
    for buckets, rest in run_distributed(_groups_in_backward, 2, memory):
        assert buckets and rest and buckets.isdisjoint(rest)
