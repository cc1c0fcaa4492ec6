import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.kernels.plain_rows import round_stochastically
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.row_gradient import row_gradients
from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.trainer.optim.rows.adam import Rounding, RowAdam, Semantics


def _table(slots: int = 50, dim: int = 3, dtype: torch.dtype = torch.float64) -> ValueTable:
    torch.manual_seed(0)
    table = ValueTable(slots, dim).to(dtype)
    table.hide()
    return table


def _reads(step: int, micro: int, below: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, weights and output gradients of 6 tokens with 4 reads each, some rows often."""
    generator = torch.Generator().manual_seed(10 * step + micro)
    rows = (torch.rand(6, 4, generator=generator) ** 2 * below).long()
    weights, upstream = (
        torch.randn(6, 4, generator=generator),
        torch.randn(6, 3, generator=generator),
    )
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
            F.embedding_bag(
                rows, twin, mode="sum", per_sample_weights=weights, sparse=True
            ).backward(upstream)
        ours.step()
        theirs.step()
        torch.testing.assert_close(table.weight, twin.data, rtol=1e-12, atol=1e-12)
    for name, moment in theirs.state[twin].items():
        torch.testing.assert_close(ours.state[table.anchor][name], moment, rtol=1e-12, atol=1e-12)

    unseen = torch.tensor([row not in seen for row in range(50)])
    assert unseen.sum() > 9
    assert torch.equal(table.weight[unseen], start[unseen])
    assert not any(
        ours.state[table.anchor][name][unseen].any() for name in ("exp_avg", "exp_avg_sq")
    )


def test_rows_that_were_not_read_keep_their_bits() -> None:
    """Rows with moments from earlier steps are among them: nothing drifts."""
    table = _table(dtype=torch.float32)
    optimizer = RowAdam([table], lr=0.1)
    state = optimizer.state[table.anchor]
    for _ in range(2):
        before = [
            tensor.clone() for tensor in (table.weight, state["exp_avg"], state["exp_avg_sq"])
        ]
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
    before = [
        table.weight.clone(),
        *(torch.as_tensor(value).clone() for value in optimizer.state[table.anchor].values()),
    ]
    optimizer.step()
    table.weighted_sum(rows, weights).backward(upstream)
    optimizer.zero_grad()
    optimizer.step()
    after = [
        table.weight,
        *(torch.as_tensor(value) for value in optimizer.state[table.anchor].values()),
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.touched == [(0, 0)]


def test_readers_of_a_shared_table_are_merged_before_the_update() -> None:
    """Two layers over one table are compared with dense gradients of the same model,
    summed by autograd.
    """

    def build() -> list[ProductKeyMemory]:
        torch.manual_seed(0)
        first = ProductKeyMemory(6, keys=5, heads=2, topk=3, key_dim=4, query_norm="layer")
        return [
            first.double(),
            ProductKeyMemory(6, keys=5, heads=2, topk=3, key_dim=4, values=first.values).double(),
        ]

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


def _gradient(step: int) -> Tensor:
    """Return a gradient of a table of 50 rows: of all of them, or every third."""
    gradient = torch.randn(
        50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
    )
    gradient[torch.arange(50) % 3 != step % 3] = 0
    return gradient


def _read_with(table: ValueTable, gradient: Tensor) -> None:
    """Make `gradient` the table's; rows without any are not read."""
    rows = gradient.any(1).nonzero()
    table.weighted_sum(rows, torch.ones_like(rows, dtype=gradient.dtype)).backward(
        gradient[rows[:, 0]]
    )


@pytest.mark.parametrize("semantics", ["lazy", "row-step", "catch-up", "dense"])
def test_every_semantics_is_dense_adam_when_all_rows_are_read(semantics: Semantics) -> None:
    table = _table()
    twin = torch.nn.Parameter(table.weight.clone())
    ours = RowAdam([table], lr=0.02, betas=(0.8, 0.95), eps=1e-12, semantics=semantics)
    theirs = torch.optim.Adam([twin], lr=0.02, betas=(0.8, 0.95), eps=1e-12)
    for step in range(12):
        gradient = sum(
            (_gradient(3 * step + part) for part in range(3)), torch.zeros(50, 3).double()
        )
        _read_with(table, gradient)
        twin.grad = gradient
        ours.step()
        theirs.step()
        torch.testing.assert_close(table.weight, twin.data, rtol=1e-8, atol=1e-8)


def test_dense_is_torchs_adam_whatever_is_read() -> None:
    table = _table()
    twin = torch.nn.Parameter(table.weight.clone())
    ours = RowAdam([table], lr=0.02, betas=(0.8, 0.95), eps=1e-3, semantics="dense")
    theirs = torch.optim.Adam([twin], lr=0.02, betas=(0.8, 0.95), eps=1e-3)
    for step in range(12):
        _read_with(table, _gradient(step))
        twin.grad = _gradient(step)
        ours.step()
        theirs.step()
        torch.testing.assert_close(table.weight, twin.data, rtol=1e-12, atol=1e-12)
    assert ours.touched[0][1] == 50


def test_catch_up_has_dense_adams_moments_in_the_rows_it_reads() -> None:
    table = _table()
    twin = torch.nn.Parameter(table.weight.clone())
    ours = RowAdam([table], lr=0.02, betas=(0.8, 0.95), semantics="catch-up")
    theirs = torch.optim.Adam([twin], lr=0.02, betas=(0.8, 0.95))
    for step in (0, 1, 2, 3, 3, 5, 0, 1):
        _read_with(table, _gradient(step))
        twin.grad = _gradient(step)
        ours.step()
        theirs.step()
        read = _gradient(step).any(1)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                ours.state[table.anchor][name][read],
                theirs.state[twin][name][read],
                rtol=1e-10,
                atol=1e-14,
            )


def test_row_step_corrects_each_row_by_its_own_steps() -> None:
    """A row that is first read late moves by the learning rate, as in its own first step."""
    table = _table()
    optimizer = RowAdam([table], lr=0.1, eps=1e-12, semantics="row-step")
    for row, times in ((1, 20), (2, 1)):
        for _ in range(times):
            before = table.weight.clone()
            table.weighted_sum(torch.tensor([[row]]), torch.ones(1, 1).double()).sum().backward()
            optimizer.step()
            torch.testing.assert_close(
                before[row] - table.weight[row], torch.full((3,), 0.1).double(), rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_tables_in_half_precision_have_moments_in_fp32(
    dtype: torch.dtype, rounding: Rounding
) -> None:
    """Gradients of 1e-5, whose squares are 0 in half precision, move the table by
    the learning rate.
    """
    table = _table(dtype=dtype)
    with torch.no_grad():
        table.weight.zero_()
    optimizer = RowAdam([table], lr=0.01, eps=1e-12, rounding=rounding)
    rows = torch.tensor([[1, 2]])
    table.weighted_sum(rows, torch.ones(1, 2, dtype=dtype)).backward(
        torch.full((1, 3), 1e-5, dtype=dtype)
    )
    optimizer.step()
    assert optimizer.state[table.anchor]["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(
        table.weight[1:3].float(), torch.full((2, 3), -0.01), rtol=0.01, atol=0
    )
    assert not table.weight[3:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_changes_below_the_resolution_of_the_values_add_up(
    dtype: torch.dtype, rounding: Rounding
) -> None:
    """There are 400 steps of 1e-5, at values of 1 whose neighbours are 5e-4 or more away."""
    table = _table(slots=4, dim=512, dtype=dtype)
    with torch.no_grad():
        table.weight.fill_(1)
    optimizer = RowAdam([table], lr=1e-5, eps=1e-12, rounding=rounding)
    for _ in range(400):
        table.weighted_sum(torch.tensor([[0, 1, 2]]), torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert table.weight[:3].float().mean() == pytest.approx(1 - 400e-5, abs=4e-4)
    assert (table.weight[3] == 1).all()


def test_stochastic_rounding_hits_both_neighbours_with_the_right_mean() -> None:
    exact = torch.tensor([1.0001, -3e-6, 0.3, 1000.4, 2.0, -6e-8, 0.0])
    bits = torch.randint(
        -(2**31), 2**31 - 1, (4000, 7), generator=torch.Generator().manual_seed(0)
    ).int()
    for dtype in (torch.float16, torch.bfloat16):
        rounded = round_stochastically(exact.expand(4000, -1).contiguous(), bits, dtype)
        distance = (
            (exact - exact.to(dtype).float()).abs().clamp(min=1e-9)
            + torch.finfo(dtype).eps * exact.abs()
            + 6e-8
        )
        assert ((rounded.float() - exact).abs() <= distance).all()
        torch.testing.assert_close(rounded.double().mean(0), exact.double(), rtol=4e-4, atol=2e-8)
        assert (rounded[:, [4, 6]].float() == exact[[4, 6]]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_is_exact_over_all_random_numbers(dtype: torch.dtype) -> None:
    """The mean over all of them is the number, to the last bit; one that the dtype holds stays."""
    # Of the 32 bits the upper 23 are used.
    bits = torch.arange(1 << 23, dtype=torch.int32) << 9
    inside = torch.tensor([1.0001, -0.3, 1000.4, -3.0517578125e-05 * 1.7])
    held = torch.tensor([2.0, -0.0, 65504.0, 6.103515625e-05]).to(dtype).float()
    for exact in (*inside, *held):
        rounded = round_stochastically(exact.expand(1 << 23), bits, dtype).double()
        # Sums of numbers of 11 bits times 2^23 are exact in fp64.
        assert rounded.sum() == exact.double() * (1 << 23), exact
        if exact in held:
            assert (rounded == exact).all() and (rounded.signbit() == exact.signbit()).all()


def test_clipping_by_the_norm_of_all_tables() -> None:
    """Each row counts once, with all its reads."""
    tables, twins = [_table(), _table()], [_table(), _table()]
    clipped, plain = RowAdam(tables, clip=0.5), RowAdam(twins)
    for number, pair in enumerate(zip(tables, twins, strict=True)):
        for table in pair:
            for micro in range(2):
                rows, weights, upstream = _reads(number, micro, 5)
                table.weighted_sum(rows, weights).backward(upstream)
    squares = sum(
        gradient.square().sum()
        for table in twins
        for _, gradient in row_gradients(table.reads, 3, table.backend)
    )
    clipped.step()
    plain.step()
    assert clipped.norm == pytest.approx(float(squares) ** 0.5)
    for table, twin in zip(tables, twins, strict=True):
        moments = clipped.state[table.anchor]["exp_avg"], plain.state[twin.anchor]["exp_avg"]
        torch.testing.assert_close(
            moments[0], moments[1] * 0.5 / float(squares) ** 0.5, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize(("option", "value"), [("semantics", "lasy"), ("rounding", "up")])
def test_unknown_options_are_explained(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is '{value}'; choose one of"):
        RowAdam([_table()], **{option: value})  # type: ignore[arg-type]


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


def test_an_update_between_forward_and_backward_is_refused_as_for_a_parameter() -> None:
    """Compiled kernels write values without torch: it has to be told."""
    table = _table(dim=4, dtype=torch.float32)
    optimizer = RowAdam([table])
    rows, weights = torch.tensor([[1, 2]]), torch.ones(1, 2, requires_grad=True)
    late = table.weighted_sum(rows, weights).sum()
    table.weighted_sum(rows, weights).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()
