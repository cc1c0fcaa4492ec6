import io
import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.row_gradient import row_gradients
from memshard.models.memory.table import ValueTable, externalize_tables, find_tables


def _model(hidden: bool) -> nn.Sequential:
    torch.manual_seed(0)
    first = ProductKeyMemory(6, keys=4, heads=2, topk=3, key_dim=4, query_norm="layer")
    model = nn.Sequential(
        first, ProductKeyMemory(6, keys=4, heads=2, topk=3, key_dim=4, values=first.values)
    )
    if hidden:
        externalize_tables(model)
    return model


def _state_bytes(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def test_only_the_table_leaves_the_parameters() -> None:
    visible, hidden = _model(False), _model(True)
    names = dict(visible.named_parameters()).keys() - dict(hidden.named_parameters()).keys()
    assert names == {"0.values.weight"}
    assert visible.state_dict().keys() == hidden.state_dict().keys()
    assert [name for name, _ in find_tables(hidden)] == ["0.values"]


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("target", [False, True])
def test_states_load_into_hidden_and_visible_tables(source: bool, target: bool) -> None:
    saved, loaded = _model(source), _model(target)
    with torch.no_grad():
        for tensor in saved.state_dict().values():
            tensor.add_(1)
    loaded.load_state_dict(torch.load(io.BytesIO(_state_bytes(saved)), weights_only=True))
    assert all(
        torch.equal(tensor, saved.state_dict()[name])
        for name, tensor in loaded.state_dict().items()
    )
    # A hidden table sums by our kernels and a visible one by torch's: in fp32 their last digits
    # differ on some processors, and the second layer's norm multiplies that by ten.
    x = torch.ones(3, 6, dtype=torch.float64)
    torch.testing.assert_close(loaded.double()(x), saved.double()(x))


@pytest.mark.parametrize("hidden", [False, True])
def test_rows_are_gathered_as_an_embedding_gathers_them(hidden: bool) -> None:
    table = ValueTable(7, 3).double()
    rows, upstream = torch.tensor([[0, 6], [6, 6], [2, 0]]), torch.randn(3, 2, 3).double()
    expected = torch.nn.functional.embedding(rows, weight := table.weight.detach().clone())
    if hidden:
        externalize_tables(table)
    values = table(rows)
    assert torch.equal(values, expected)
    values.backward(upstream)
    dense = torch.zeros_like(weight).index_add_(0, rows.flatten(), upstream.flatten(0, 1))
    ours = (
        torch.cat([part.sums(0, len(part.rows)) for part in table.gradients(1)])
        if hidden
        else table.weight.grad
    )
    torch.testing.assert_close(ours, dense[[0, 2, 6]] if hidden else dense)


@pytest.mark.parametrize("hidden", [False, True])
def test_wrong_states_are_refused(hidden: bool) -> None:
    model = _model(hidden)
    state = dict(model.state_dict())
    missing = {name: tensor for name, tensor in state.items() if "values" not in name}
    with pytest.raises(RuntimeError, match="Missing key.*0.values.weight"):
        model.load_state_dict(missing)
    model.load_state_dict(missing, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch for 0.values.weight"):
        model.load_state_dict(state | {"0.values.weight": torch.zeros(15, 6)})
    with pytest.raises(RuntimeError, match="Unexpected key.*0.values.other"):
        model.load_state_dict(state | {"0.values.other": torch.zeros(1)})


@pytest.mark.parametrize("hidden", [False, True])
def test_to_and_deepcopy(hidden: bool) -> None:
    model = _model(hidden)
    copy = deepcopy(model).to(torch.float64)
    table, other = model[0].values, copy[0].values
    assert isinstance(table, ValueTable) and isinstance(other, ValueTable)
    assert other.weight.dtype == torch.float64 and table.weight.dtype == torch.float32
    assert (
        torch.equal(table.weight.double(), other.weight)
        and copy[1].values is other
        and other.hidden == hidden
    )
    with torch.no_grad():
        other.weight.add_(1)
    assert not torch.equal(table.weight.double(), other.weight)
    copy(torch.ones(3, 6, dtype=torch.float64)).sum().backward()
    if hidden:
        assert len(other.reads) == 2 and not table.reads


@pytest.mark.parametrize("hidden", [False, True])
def test_a_model_can_be_pickled_whole(hidden: bool) -> None:
    model = _model(hidden)
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy(torch.ones(3, 6)), model(torch.ones(3, 6)))


@pytest.mark.parametrize("hidden", [False, True])
def test_meta_to_empty_and_assign(hidden: bool) -> None:
    with torch.device("meta"):
        empty, assigned = _model(hidden), _model(hidden)
    model = _model(hidden)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assigned.load_state_dict(model.state_dict(), assign=True)
    for copy in (empty, assigned):
        y = copy(torch.ones(3, 6))
        assert torch.equal(y, model(torch.ones(3, 6)))
        y.sum().backward()


def test_evaluation_collects_nothing() -> None:
    model = _model(True)
    with torch.no_grad():
        model(torch.ones(3, 6))
    model(torch.ones(3, 6))
    ((_, table),) = find_tables(model)
    assert not table.reads and table.anchor.grad is None


def test_micro_batches_keep_5_kb_a_token() -> None:
    """A token makes 128 reads of 1024 values in fp32: the rows and weights of the reads are kept,
    and one upstream gradient.
    """
    table = ValueTable(64, 1024)
    table.hide()
    table.has_optimizer = True
    tokens = 0
    for _ in range(4):
        weights = torch.rand(8, 128, requires_grad=True)
        table.weighted_sum(torch.randint(64, (8, 128)), weights).backward(torch.randn(8, 1024))
        tokens += 8
    kept = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for read in table.reads
        for x in vars(read).values()
    }
    assert len(table.reads) == 4 and sum(kept.values()) < 5.2 * 1024 * tokens
    # Summed in blocks: no more than 5 rows' gradients at a time, none of them dense.
    assert (
        sum(
            len(rows)
            for rows, gradient in row_gradients(table.reads, 5, table.backend)
            if gradient.shape == (len(rows), 1024)
        )
        == 64
    )


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["weights", "upstream"])
def test_what_is_not_finite_shows_in_the_anchor(where: str, bad: float) -> None:
    table = ValueTable(4, 2)
    table.hide()
    table.has_optimizer = True
    rows, weights = torch.tensor([[0, 3]]), torch.ones(1, 2)
    upstream = torch.ones(1, 2)
    for number in range(3):
        # One bad read among good ones.
        (weights if where == "weights" else upstream)[0, 1] = bad if number == 1 else 1.0
        table.weighted_sum(rows, weights.clone()).backward(upstream.clone())
        assert table.anchor.grad is not None
        assert bool(table.anchor.grad.isfinite().all()) == (number == 0)
    table.drop_reads()
    assert not table.reads and table.anchor.grad is None


def test_rows_start_with_variance_one_over_dim_whatever_range_is_held() -> None:
    torch.manual_seed(3)
    whole = ValueTable(5000, 16)
    torch.manual_seed(3)
    part = ValueTable(5000, 16, local_rows=range(4090, 4100))
    assert torch.equal(whole.weight[4090:4100], part.weight)
    assert abs(whole.weight.var() * 16 - 1) < 0.02 and abs(whole.weight.mean()) < 0.005
    assert len(whole.weight.unique(dim=0)) == 5000
    assert len(ValueTable(5, 2, local_rows=range(5, 5)).weight) == 0


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dot_products_and_their_gradients(hidden: bool, dtype: torch.dtype) -> None:
    table = ValueTable(6, 5).to(dtype)
    twin = table.weight.detach().clone().requires_grad_()
    if hidden:
        table.hide()
    rows = torch.tensor([[0, 3, 3], [5, 0, 1]])
    upstream = torch.randn(2, 3, dtype=dtype)
    x = torch.randn(2, 5, dtype=dtype, requires_grad=True)
    products, expected = table.dot(rows, x), (twin[rows] * x[:, None]).sum(-1)
    torch.testing.assert_close(products, expected)
    (to_x,) = torch.autograd.grad(products, x, upstream, retain_graph=True)
    table.drop_reads() if hidden else None
    products.backward(upstream)
    x.grad = None
    expected.backward(upstream)
    torch.testing.assert_close(to_x, x.grad)
    dense = table.weight.grad
    if hidden:
        dense = torch.zeros_like(table.weight)
        for read, gradient in row_gradients(table.reads, 10, table.backend):
            dense[read] = gradient
    torch.testing.assert_close(dense, twin.grad)
