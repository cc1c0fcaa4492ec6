"""A table spread over ranks, in every layout, is the local table: reads, gradients, updates, usage,
initial values.
"""

from copy import deepcopy
from dataclasses import asdict
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from memshard.models.initialize import initialize
from memshard.models.memory.peer import Peer
from memshard.models.memory.slot_usage import UsageCounter
from memshard.models.memory.table import ValueTable, externalize_tables, find_tables
from memshard.models.transformer import Transformer
from memshard.parallel.apply import apply
from memshard.parallel.mesh import build_mesh
from memshard.parallel.tables.layouts import LAYOUTS, LayoutName
from memshard.parallel.tables.shard_tables import shard_tables
from memshard.parallel.tables.tensor_columns import TensorColumnTable
from memshard.trainer.evaluation.slot_usage import usage_reports
from memshard.trainer.optim.rows.adam import RowAdam
from tests.distributed import run_distributed
from tests.models.tiny import tiny_config

_CASES = {
    "rows do not divide": (13, (5, 3, 4, 2), 13),
    "rows divide": (12, (2, 2, 2, 2), 12),
    "a rank nobody asks": (12, (3, 2, 3, 1), 3),
    "repeated ids": (16, (6, 6, 6, 6), 2),
    "a rank without tokens": (9, (3, 0, 2, 1), 9),
    "only the last rank has tokens": (10, (0, 0, 0, 4), 10),
    "no tokens at all": (10, (0, 0, 0, 0), 10),
    "more ranks than rows": (3, (2, 3, 1, 2), 3),
    "a single row": (1, (1, 2, 1, 1), 1),
}


_LAYOUTS = [name for name, layout in LAYOUTS.items() if not layout.within_tensor_group]


def _piece(x: Tensor, world: int, rank: int, dim: int = 0) -> Tensor:
    """Return a rank's part as torch.chunk cuts it; the last ranks may have none."""
    size = -(-x.shape[dim] // world)
    first = min(rank * size, x.shape[dim])
    return x.narrow(dim, first, min(size, x.shape[dim] - first))


def _groups(rank: int, world: int, memory: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return the rank's memory group, of neighbouring ranks, and the ranks that hold
    the same part.
    """
    mesh = init_device_mesh("cpu", (world // memory, memory), mesh_dim_names=("replica", "memory"))
    return mesh.get_group("memory"), mesh.get_group("replica")


def _check_parity(rank: int, world: int) -> None:
    """Compare, on every rank, the sharded table with a local copy that reads the tokens
    of all ranks.
    """
    for memory in (size for size in (1, 2, 3, 4) if world % size == 0 and (size > 1 or world < 3)):
        group, replicas = _groups(rank, world, memory)
        # In host memory only what happens inside a rank differs.
        for host, layout in product((False, True) if world == 2 else (False,), _LAYOUTS):
            for name, (slots, counts, below) in _CASES.items():
                tokens = counts[:world] if world < 4 else counts
                case = (
                    f"{name}, {layout}, {memory} of {world} "
                    f"ranks{', in host memory' if host else ''}"
                )
                torch.manual_seed(1)
                whole = ValueTable(slots, 5).double()
                holder = torch.nn.ModuleDict({"a": deepcopy(whole)})
                (shard,) = shard_tables(holder, group, False, layout, replicas)
                whole.hide()
                shard.host = host
                assert holder["a"] is shard and not list(holder.parameters())
                part = LAYOUTS[layout].split_dim, memory, rank % memory
                assert torch.equal(shard.weight, _piece(whole.weight, part[1], part[2], part[0])), (
                    case
                )
                _compare(whole, shard, tokens, below, part, case, rank)


def _compare(
    whole: ValueTable,
    shard: ValueTable,
    tokens: tuple[int, ...],
    below: int,
    part: tuple[int, int, int],
    case: str,
    rank: int,
) -> None:
    optimizers = RowAdam([whole], lr=0.1, alone=True), RowAdam([shard], lr=0.1)
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    whole.observer, shard.observer = counters = UsageCounter(whole), UsageCounter(shard)
    results: list[Any] = []
    for _ in range(2):
        for _ in range(2):
            rows = torch.randint(below, (sum(tokens), 6))
            weights = torch.rand(rows.shape, dtype=torch.float64)
            upstream = torch.randn(len(rows), 5, dtype=torch.float64)
            all_weights, my_weights = (
                weights.clone().requires_grad_(),
                weights[mine].clone().requires_grad_(),
            )
            expected, y = (
                whole.weighted_sum(rows, all_weights),
                shard.weighted_sum(rows[mine], my_weights),
            )
            torch.testing.assert_close(y, expected[mine], rtol=1e-12, atol=1e-12, msg=case)
            expected.backward(upstream)
            y.backward(upstream[mine])
            assert my_weights.grad is not None and all_weights.grad is not None
            torch.testing.assert_close(
                my_weights.grad, all_weights.grad[mine], rtol=1e-12, atol=1e-12, msg=case
            )
        for table, tokens_of in ((whole, slice(None)), (shard, mine)):
            x = (upstream + 1)[tokens_of].requires_grad_()
            products = table.dot(rows[tokens_of], x)
            products.backward(weights[tokens_of] - 0.5)
            results.append((products, x.grad))
        torch.testing.assert_close(
            results[-1][0], results[-2][0][mine], rtol=1e-12, atol=1e-12, msg=case
        )
        torch.testing.assert_close(
            results[-1][1], results[-2][1][mine], rtol=1e-12, atol=1e-12, msg=case
        )
        for table, tokens_of in ((whole, slice(None)), (shard, mine)):
            values = table.gather(rows[tokens_of])
            values.backward(upstream[tokens_of, None] * weights[tokens_of, :, None])
            results.append((values,))
        torch.testing.assert_close(
            results[-1][0], results[-2][0][mine], rtol=1e-12, atol=1e-12, msg=case
        )
        for optimizer in optimizers:
            optimizer.step()
        expected = _piece(whole.weight, part[1], part[2], part[0])
        torch.testing.assert_close(shard.weight, expected, rtol=1e-10, atol=1e-10, msg=case)
        assert (
            optimizers[0].state[whole.anchor]["step"] == optimizers[1].state[shard.anchor]["step"]
        ), case
    expected_usage, usage = counters[0].report(), usage_reports({"a": counters[1]})["a"]
    for key, value in asdict(expected_usage).items():
        assert asdict(usage)[key] == pytest.approx(value, rel=1e-9, abs=1e-9), (case, key)


def _check_same_reads(rank: int, world: int) -> None:
    """Split columns over ranks that all read the same, as tensor-parallel ranks do."""
    torch.manual_seed(1)
    whole = ValueTable(7, 5).double()
    group = dist.group.WORLD
    assert group is not None
    shard = TensorColumnTable(7, 5, group)
    whole.hide()
    shard.set_values(
        _piece(whole.weight, world, rank, dim=1).clone(memory_format=torch.contiguous_format)
    )
    optimizers = RowAdam([whole], lr=0.1, alone=True), RowAdam([shard], lr=0.1)
    for _ in range(2):
        rows, upstream = torch.randint(7, (4, 3)), torch.randn(4, 5, dtype=torch.float64)
        weights = [
            torch.rand(
                4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
            ).requires_grad_()
            for _ in range(2)
        ]
        sums = [
            table.weighted_sum(rows, of_reads)
            for table, of_reads in zip((whole, shard), weights, strict=True)
        ]
        for sum_ in sums:
            sum_.backward(upstream)
        tokens = [upstream.clone().requires_grad_() for _ in range(2)]
        products = [table.dot(rows, x) for table, x in zip((whole, shard), tokens, strict=True)]
        for answer in products:
            answer.backward(weights[0].detach() - 0.3)
        torch.testing.assert_close(products[1], products[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tokens[1].grad, tokens[0].grad, rtol=1e-12, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(sums[1], sums[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights[1].grad, weights[0].grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            shard.weight, _piece(whole.weight, world, rank, dim=1), rtol=1e-10, atol=1e-10
        )


def _check_optimizers(rank: int, world: int) -> None:
    """Check every semantics, half-precision values and clipping: the bits are the same, or nearly
    so, in all layouts.
    """
    options: list[dict[str, Any]] = [
        {"semantics": "row-step", "clip": 0.3},
        {"semantics": "catch-up"},
        {"semantics": "dense"},
        {"rounding": "stochastic"},
        {"rounding": "master", "semantics": "row-step"},
    ]
    for number, option in enumerate(options):
        for memory in {1, world}:
            for layout in _LAYOUTS:
                torch.manual_seed(number)
                whole = ValueTable(9, 6).to(
                    torch.float16 if "rounding" in option else torch.float64
                )
                holder = torch.nn.ModuleDict({"a": deepcopy(whole)})
                group, replicas = _groups(rank, world, memory)
                (shard,) = shard_tables(holder, group, False, layout, replicas)
                whole.hide()
                optimizers = (
                    RowAdam([whole], lr=0.1, alone=True, **option),
                    RowAdam([shard], lr=0.1, **option),
                )
                for _ in range(3):
                    rows = torch.randint(4, (world, 3)) + torch.randint(6, ())
                    weights, upstream = (
                        torch.rand(world, 3, dtype=torch.float64),
                        torch.randn(world, 6, dtype=torch.float64),
                    )
                    dtype = torch.promote_types(whole.weight.dtype, torch.float32)
                    whole.weighted_sum(rows, weights.to(dtype)).backward(upstream.to(dtype))
                    shard.weighted_sum(rows[rank, None], weights[rank, None].to(dtype)).backward(
                        upstream[rank, None].to(dtype)
                    )
                    for optimizer in optimizers:
                        optimizer.step()
                case = f"{option}, {layout}, {memory} of {world} ranks"
                part = _piece(whole.weight, memory, rank % memory, LAYOUTS[layout].split_dim)
                tolerance = 2e-3 if "rounding" in option else 1e-10
                torch.testing.assert_close(
                    shard.weight, part, rtol=tolerance, atol=tolerance, msg=case
                )
                if "clip" in option:
                    assert optimizers[1].norm == pytest.approx(optimizers[0].norm, rel=1e-10), case


def _check_life(rank: int, world: int) -> None:
    """Check deepcopy, dtype changes and states of a shard."""
    torch.manual_seed(1)
    holder = torch.nn.ModuleDict({"a": ValueTable(7, 4)})
    (shard,) = shard_tables(holder)
    assert shard.gradient_scale == 1 / world
    ((_, copy),) = find_tables(deepcopy(holder).double())
    assert torch.equal(copy.weight, shard.weight.double()) and copy.gradient_scale == 1 / world
    before = shard.weight.double() + 1
    # As DTensors where there are several ranks.
    holder.load_state_dict({f"a.{name}": x + 1 for name, x in copy.state_dict().items()})
    torch.testing.assert_close(shard.weight.double(), before)
    y = copy.weighted_sum(torch.tensor([[0, 6]]), torch.ones(1, 2).double())
    whole = torch.cat(_gather(copy.weight, 7, world))
    torch.testing.assert_close(y[0], whole[0] + whole[6])


def _check_frozen(rank: int, world: int) -> None:
    """Shards learn from the passes that ask for all gradients, unless their layer is frozen."""
    for layout in _LAYOUTS:
        torch.manual_seed(1)
        layers = [Peer(6, keys=5, heads=2, topk=3, key_dim=4, query_norm="layer") for _ in "ab"]
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), *layers)
        layers[1].requires_grad_(False)
        tables = shard_tables(model, layout=layout)
        RowAdam(tables)
        loss = model(torch.randn(4, 6)).square().sum()
        dense = [*model[0].parameters()]
        torch.autograd.grad(loss, dense, retain_graph=True)
        loss.backward(inputs=dense, retain_graph=True)
        assert not any(table.reads for table in tables), layout
        loss.backward()
        assert [len(table.reads) for table in tables] == [1, 1, 0, 0], layout
        layers[1].requires_grad_(True)
        model(torch.randn(4, 6)).square().sum().backward(inputs=[tables[3].anchor])
        assert [len(table.reads) for table in tables] == [1, 1, 0, 1], layout


def test_shards_are_frozen_as_whole_tables_are() -> None:
    run_distributed(_check_frozen, 2)


def _gather(x: Tensor, slots: int, world: int) -> list[Tensor]:
    parts = [
        x.new_empty(_piece(torch.empty(slots), world, r).shape[0], x.shape[1]) for r in range(world)
    ]
    for source, part in enumerate(parts):
        if source == dist.get_rank():
            part.copy_(x)
        dist.broadcast(part, source)
    return parts


def _initial_state(share: bool, layout: LayoutName) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return this rank's state of a model that was built on meta, spread, and only
    then given memory.
    """
    with torch.device("meta"):
        model = Transformer(tiny_config({"keys": 5, "share": share}))
    placement = apply(model, build_mesh("cpu"), layout)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)  # in the model: a state dict shares its memory
    initialize(model, 7)
    state = {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    return state, {name: spec.dim for name, spec in placement.items()}


_INITIAL: list[tuple[bool, LayoutName]] = [(False, "rows"), (True, "rows"), (True, "columns")]


def _body(rank: int, world: int) -> list[tuple[dict[str, Tensor], dict[str, int]]]:
    _check_parity(rank, world)
    _check_same_reads(rank, world)
    _check_optimizers(rank, world)
    _check_life(rank, world)
    return [_initial_state(share, layout) for share, layout in _INITIAL]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_sharded_table_equals_the_local_one(world: int) -> None:
    """All checks are made at once: starting ranks is what takes time."""
    ranks = run_distributed(_body, world)
    for index, (share, layout) in enumerate(_INITIAL):
        model = Transformer(tiny_config({"keys": 5, "share": share}))
        externalize_tables(model)
        initialize(model, 7)
        split = {name for name in model.state_dict() if "values" in name}
        for name, tensor in model.state_dict().items():
            pieces = [states[index][0][name] for states in ranks]
            # A table is listed under every name that it has.
            placements = [states[index][1] for states in ranks]
            assert all(
                set(placement) == (split if world > 1 else set()) for placement in placements
            )
            if name in placements[0]:
                assert placements[0][name] == LAYOUTS[layout].split_dim
                assert torch.equal(torch.cat(pieces, dim=placements[0][name]), tensor), name
            else:
                assert all(torch.equal(piece, tensor) for piece in pieces), name
