"""Reversible and checkpointed models on two ranks give the gradients of one process, in all modes
of DDP and with tables split any way.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from memshard.models.context import Context
from memshard.models.loss import token_losses
from memshard.models.memory.table import find_tables
from memshard.models.random import RandomKey
from memshard.models.recompute.checkpointing import Checkpointing, Recompute
from memshard.parallel.apply import apply
from memshard.parallel.mesh import build_mesh
from memshard.parallel.tables.layouts import LAYOUTS, LayoutName
from memshard.parallel.tables.sharded import ShardedTable
from memshard.trainer.optim.rows.adam import RowAdam
from tests.distributed import run_distributed
from tests.models.tiny import tiny_config, tiny_model, tiny_tokens

_MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}
_LAYOUTS = [name for name, layout in LAYOUTS.items() if not layout.within_tensor_group]
_MEMORIES: list[dict[str, Any]] = [
    {"share": True, "mode": "add"},
    {"kind": "peer", "query_norm": "lagged"},
]
_BUCKET_MB = 1e-3  # several buckets, so that gradients travel during backward


def _gradients(
    rank: int,
    world: int,
    memory: dict[str, Any],
    mode: str,
    layout: LayoutName,
    residual: str,
    kind: Checkpointing,
) -> dict[str, Tensor]:
    """Return, after two micro-batches (one with a static graph) of 4 texts, gradients of parameters
    and table rows, and running statistics.
    """
    model = tiny_model(tiny_config(memory, residual=residual, dropout=0.2), spread=0.1).train()
    model.configure(Recompute(kind))
    apply(model, build_mesh("cpu"), layout)
    # Never stepped; without one a hidden table refuses to be trained.
    RowAdam([table for _, table in find_tables(model)])
    # As the trainer has it: they enter once a step.
    for _, layer in model.memories():
        layer.query_norm.deferred = True
    wrapped: Any = model
    if world > 1:
        wrapped = DistributedDataParallel(
            model, forward_sync_buffers=False, bucket_cap_mb=_BUCKET_MB, **_MODES[mode]
        )
        wrapped.register_comm_hook(None, _sum)
    mine = slice(0, 4) if world == 1 else (slice(0, 3), slice(3, 4))[rank]
    # A static graph and no_sync do not go together.
    for batch in range(1 if mode == "static_graph" else 2):
        tokens = tiny_tokens(4, 9, seed=batch)[mine]
        ctx = Context(
            torch.arange(9).expand(len(tokens), -1),
            random=RandomKey(0, batch, torch.arange(4)[mine]),
        )
        with (
            wrapped.no_sync()
            if world > 1 and batch == 0 and mode != "static_graph"
            else nullcontext()
        ):
            (token_losses(wrapped(tokens, ctx)[0][:, :-1], tokens[:, 1:]).sum() / 32).backward()
    for _, layer in model.memories():
        layer.query_norm.commit()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | dict(
        model.named_buffers()
    )
    return gradients | {name: _row_gradients(table) for name, table in find_tables(model)}


def _sum(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def _row_gradients(table: Any) -> Tensor:
    """Return the whole table's gradient."""
    whole = torch.zeros(table.slots, table.dim, dtype=torch.float64)
    columns = slice(table.local_columns.start, table.local_columns.stop)
    for part in table.gradients(1.0):
        whole[part.rows + table.first_row, columns] = part.sums(0, len(part.rows))
    if isinstance(table, ShardedTable):
        dist.all_reduce(whole)
    return whole


_CASES: list[tuple[Any, ...]] = [
    *(
        (_MEMORIES[0], mode, layout, "reversible", "none")
        for mode in _MODES
        for layout in _LAYOUTS[:1]
    ),
    *(
        (memory, "plain", layout, "reversible", "none")
        for memory in _MEMORIES
        for layout in _LAYOUTS
    ),
    *(
        (memory, "plain", layout, "pre", kind)
        for memory in _MEMORIES
        for layout in _LAYOUTS[1:]
        for kind in ("full", "selective")
    ),
    *((_MEMORIES[0], mode, _LAYOUTS[0], "pre", "full") for mode in ("find_unused", "static_graph")),
]


def _body(rank: int, world: int) -> list[dict[str, Tensor]]:
    return [_gradients(rank, world, *case) for case in _CASES]


@pytest.fixture(scope="module")
def two_ranks() -> list[list[dict[str, Tensor]]]:
    return run_distributed(_body, 2)


@pytest.mark.parametrize("index", range(len(_CASES)), ids=[str(case) for case in _CASES])
def test_two_ranks_are_one(index: int, two_ranks: list[list[dict[str, Tensor]]]) -> None:
    memory, mode, _, residual, _ = _CASES[index]
    alone = _gradients(0, 1, memory, mode, "rows", residual, "none")
    for rank in two_ranks:
        assert rank[index].keys() == alone.keys()
        for name, expected in alone.items():
            # Sums over ranks differ in their last bits; a branch that such a bit pushes over a grid
            # line would differ by a step.
            torch.testing.assert_close(
                rank[index][name], expected, rtol=1e-7, atol=1e-9, msg=partial(_message, name)
            )


def _message(name: str, text: str) -> str:
    return f"{name}: {text}"
