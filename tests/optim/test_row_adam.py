import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.trainer.optim.row_adam import RowAdam


def _table(slots: int = 50, dim: int = 3, dtype: torch.dtype = torch.float64) -> ValueTable:
    torch.manual_seed(0)
    table = ValueTable(slots, dim).to(dtype)
    table.hide()
    return table


def _reads(step: int, micro: int, below: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and output gradients of 6 tokens with 4 reads each, some rows often."""
    generator = torch.Generator().manual_seed(10 * step + micro)
    rows = (torch.rand(6, 4, generator=generator) ** 2 * below).long()
    weights, upstream = torch.randn(6, 4, generator=generator), torch.randn(6, 3, generator=generator)
    return rows, weights.double(), upstream.double()


def test_20_steps_of_micro_batches_equal_torchs_sparse_adam() -> None:
    table = _table()
    start = table.weight.clone()
    ours = RowAdam([table], lr=0.02, betas=(0.8, 0.95), eps=1e-6)
    twin = torch.nn.Parameter(start.clone())
    theirs = torch.optim.SparseAdam([twin], lr=0.02, betas=(0.8, 0.95), eps=1e-6)
    seen: set[int] = set()
    for step in range(20):
        theirs.zero_grad()
        for micro in range(3):
            rows, weights, upstream = _reads(step, micro, below=2 + 2 * step)
            seen |= set(rows.flatten().tolist())
            table.weighted_sum(rows, weights).backward(upstream)
            F.embedding_bag(rows, twin, mode="sum", per_sample_weights=weights, sparse=True).backward(upstream)
        ours.step()
        theirs.step()
        torch.testing.assert_close(table.weight, twin.data, rtol=1e-12, atol=1e-12)
    for name, moment in ours.state[table.anchor].items():
        torch.testing.assert_close(moment, theirs.state[twin][name], rtol=1e-12, atol=1e-12)

    unseen = torch.tensor([row not in seen for row in range(50)])
    assert unseen.sum() > 9
    assert torch.equal(table.weight[unseen], start[unseen])
    assert not any(ours.state[table.anchor][name][unseen].any() for name in ("exp_avg", "exp_avg_sq"))


def test_rows_that_were_not_read_keep_their_bits() -> None:
    """Rows with moments from earlier steps included: nothing drifts."""
    table = _table(dtype=torch.float32)
    optimizer = RowAdam([table], lr=0.1)
    state = optimizer.state[table.anchor]
    for _ in range(2):
        before = [tensor.clone() for tensor in (table.weight, state["exp_avg"], state["exp_avg_sq"])]
        rows = torch.tensor([[3, 7, 3]])
        table.weighted_sum(rows, torch.ones(1, 3)).sum().backward()
        optimizer.step()
        after = (table.weight, state["exp_avg"], state["exp_avg_sq"])
        assert optimizer.touched == [(3, 2)]
        for old, new in zip(before, after, strict=True):
            changed = (old != new).any(1).nonzero().flatten().tolist()
            assert changed == [3, 7]
        table.weighted_sum(torch.arange(50)[:, None], torch.ones(50, 1)).sum().backward()
        optimizer.step()


def test_nothing_read_changes_nothing() -> None:
    table = _table()
    optimizer = RowAdam([table])
    rows, weights, upstream = _reads(0, 0, 50)
    table.weighted_sum(rows, weights).backward(upstream)
    optimizer.step()
    before = [table.weight.clone(), *(torch.as_tensor(value).clone() for value in optimizer.state[table.anchor].values())]
    optimizer.step()
    table.weighted_sum(rows, weights).backward(upstream)
    optimizer.zero_grad()
    optimizer.step()
    after = [table.weight, *(torch.as_tensor(value) for value in optimizer.state[table.anchor].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.touched == [(0, 0)]


def test_readers_of_a_shared_table_are_merged_before_the_update() -> None:
    """Two layers over one table against dense gradients of the same model, summed by autograd."""

    def build() -> list[ProductKeyMemory]:
        torch.manual_seed(0)
        first = ProductKeyMemory(6, keys=5, heads=2, topk=3, key_dim=4, query_norm="layer")
        return [first.double(), ProductKeyMemory(6, keys=5, heads=2, topk=3, key_dim=4, values=first.values).double()]

    model, twin = build(), build()
    tables = externalize_tables(torch.nn.ModuleList(model))
    assert len(tables) == 1
    ours = RowAdam(tables, lr=0.1)
    values = twin[0].values.weight
    assert isinstance(values, torch.nn.Parameter)
    theirs = torch.optim.SparseAdam([values], lr=0.1)
    for step in range(3):
        x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for layers in (model, twin):
            layers[1](layers[0](x)).square().sum().backward()
        assert values.grad is not None
        values.grad = values.grad.to_sparse(1)
        ours.step()
        theirs.step()
        theirs.zero_grad()
        torch.testing.assert_close(tables[0].weight, values.data, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_in_half_precision_have_moments_in_fp32(dtype: torch.dtype) -> None:
    """Gradients of 1e-5, whose squares are 0 in half precision, move the table by the learning rate."""
    table = _table(dtype=dtype)
    with torch.no_grad():
        table.weight.zero_()
    optimizer = RowAdam([table], lr=0.01, eps=1e-12)
    rows = torch.tensor([[1, 2]])
    table.weighted_sum(rows, torch.ones(1, 2, dtype=dtype)).backward(torch.full((1, 3), 1e-5, dtype=dtype))
    optimizer.step()
    assert optimizer.state[table.anchor]["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(table.weight[1:3].float(), torch.full((2, 3), -0.01), rtol=0.01, atol=0)
    assert not table.weight[3:].any()


def test_gradient_scale() -> None:
    """1/2 of the gradient, read twice, is the gradient."""
    tables = _table(), _table()
    tables[1].gradient_scale = 0.5
    optimizer = RowAdam(tables)
    rows, weights, upstream = _reads(0, 0, 50)
    for table, passes in zip(tables, (1, 2), strict=True):
        for _ in range(passes):
            table.weighted_sum(rows, weights).backward(upstream)
    optimizer.step()
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-12, atol=1e-12)


def test_visible_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="externalize_tables"):
        RowAdam([ValueTable(4, 2)])
