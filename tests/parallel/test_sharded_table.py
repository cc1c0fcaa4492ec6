"""A table split by rows over ranks is the local table: reads, gradients, updates, initial values."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.initialize import initialize
from memshard.models.memory.table import ValueTable, externalize_tables, find_tables
from memshard.models.transformer import Transformer
from memshard.parallel.apply import apply
from memshard.parallel.mesh import build_mesh
from memshard.parallel.tables.shard import shard_tables
from memshard.trainer.optim.row_adam import RowAdam
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


def _piece(x: Tensor, world: int, rank: int) -> Tensor:
    """Rank's rows as torch.chunk cuts them; the last ranks may have none."""
    size = -(-len(x) // world)
    return x[rank * size : (rank + 1) * size]


def _check_parity(rank: int, world: int) -> None:
    """On every rank the sharded table against a local copy that reads the tokens of all ranks."""
    for name, (slots, counts, below) in _CASES.items():
        tokens = counts[:world] if world < 4 else counts
        torch.manual_seed(1)
        whole = ValueTable(slots, 5).double()
        holder = torch.nn.ModuleDict({"a": deepcopy(whole)})
        (shard,) = shard_tables(holder, average=False)
        whole.hide()
        assert holder["a"] is shard and not list(holder.parameters())
        assert torch.equal(shard.weight, _piece(whole.weight, world, rank)), name
        optimizers = RowAdam([whole], lr=0.1), RowAdam([shard], lr=0.1)
        mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
        for _ in range(2):
            for _ in range(2):
                rows = torch.randint(below, (sum(tokens), 6))
                weights = torch.randn(rows.shape, dtype=torch.float64)
                upstream = torch.randn(len(rows), 5, dtype=torch.float64)
                all_weights, my_weights = weights.clone().requires_grad_(), weights[mine].clone().requires_grad_()
                expected, y = whole.weighted_sum(rows, all_weights), shard.weighted_sum(rows[mine], my_weights)
                torch.testing.assert_close(y, expected[mine], rtol=1e-12, atol=1e-12, msg=name)
                expected.backward(upstream)
                y.backward(upstream[mine])
                assert my_weights.grad is not None and all_weights.grad is not None
                torch.testing.assert_close(my_weights.grad, all_weights.grad[mine], rtol=1e-12, atol=1e-12, msg=name)
            for optimizer in optimizers:
                optimizer.step()
            torch.testing.assert_close(shard.weight, _piece(whole.weight, world, rank), rtol=1e-10, atol=1e-10, msg=name)


def _check_life(rank: int, world: int) -> None:
    """deepcopy, dtype changes and states of a shard."""
    torch.manual_seed(1)
    holder = torch.nn.ModuleDict({"a": ValueTable(7, 4)})
    (shard,) = shard_tables(holder)
    assert shard.gradient_scale == 1 / world
    ((_, copy),) = find_tables(deepcopy(holder).double())
    assert torch.equal(copy.weight, shard.weight.double()) and copy.gradient_scale == 1 / world
    state = {f"a.{name}": tensor + 1 for name, tensor in copy.state_dict().items()}
    holder.load_state_dict(state)
    torch.testing.assert_close(shard.weight.double(), state["a.weight"])
    y = copy.weighted_sum(torch.tensor([[0, 6]]), torch.ones(1, 2).double())
    whole = torch.cat(_gather(copy.weight, 7, world))
    torch.testing.assert_close(y[0], whole[0] + whole[6])


def _gather(x: Tensor, slots: int, world: int) -> list[Tensor]:
    parts = [x.new_empty(_piece(torch.empty(slots), world, r).shape[0], x.shape[1]) for r in range(world)]
    for source, part in enumerate(parts):
        if source == dist.get_rank():
            part.copy_(x)
        dist.broadcast(part, source)
    return parts


def _initial_state(share: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
    """This rank's state of a model that was built on meta, spread, and only then given memory."""
    with torch.device("meta"):
        model = Transformer(tiny_config({"keys": 5, "share": share}))
    placement = apply(model, build_mesh("cpu"))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    initialize(model, 7)
    return dict(model.state_dict()), {name: spec.dim for name, spec in placement.items()}


def _body(rank: int, world: int) -> list[tuple[dict[str, Tensor], dict[str, int]]]:
    _check_parity(rank, world)
    _check_life(rank, world)
    return [_initial_state(share) for share in (False, True)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_sharded_table_equals_the_local_one(world: int) -> None:
    """All checks at once: starting ranks is what takes time."""
    ranks = run_distributed(_body, world)
    for index, share in enumerate((False, True)):
        model = Transformer(tiny_config({"keys": 5, "share": share}))
        externalize_tables(model)
        initialize(model, 7)
        split = {name for name in model.state_dict() if "values" in name}
        for name, tensor in model.state_dict().items():
            pieces = [states[index][0][name] for states in ranks]
            # A table is listed under every name that it has.
            placements = [states[index][1] for states in ranks]
            assert all(set(placement) == (split if world > 1 else set()) for placement in placements)
            if name in placements[0]:
                assert sum(len(piece) for piece in pieces) == 25
                assert torch.equal(torch.cat(pieces, dim=placements[0][name]), tensor), name
            else:
                assert all(torch.equal(piece, tensor) for piece in pieces), name
