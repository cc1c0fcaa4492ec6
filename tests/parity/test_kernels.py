"""The compiled CPU kernels are plain torch: sums, gradients, order of reads, steps of every semantics and dtype."""

from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.models.kernels import plain
from memshard.models.kernels.select import SWITCH, compiled
from memshard.models.memory.table import ValueTable
from memshard.trainer.optim.row_adam import RowAdam

KERNELS, WHY = compiled()
needs_compiler = pytest.mark.skipif(KERNELS is None, reason=WHY)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 15, 16, 37, 64])
@pytest.mark.parametrize("lengths", [(0, 0), (3, 0, 1, 9), (5,), (4, 8), ()], ids=str)
def test_sums_and_score_gradients(dtype: torch.dtype, dim: int, lengths: tuple[int, ...]) -> None:
    assert KERNELS is not None
    reads = sum(lengths)
    values = torch.randn(11, dim).to(dtype)
    rows, weights, upstream = torch.randint(11, (reads,)), torch.randn(reads), torch.randn(len(lengths), dim)
    offsets = torch.tensor([sum(lengths[:bag]) for bag in range(len(lengths))], dtype=torch.int64)
    ours = KERNELS.gather_sum(values, rows, weights, offsets), KERNELS.score_gradients(values, rows, offsets, upstream)
    theirs = plain.gather_sum(values, rows, weights, offsets), plain.score_gradients(values, rows, offsets, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(("reads", "slots"), [(0, 5), (1, 1), (100, 7), (5000, 2**31 - 1), (3000, 2048), (3000, 2049)])
def test_order_of_reads(reads: int, slots: int) -> None:
    assert KERNELS is not None
    rows = torch.randint(slots, (reads,), dtype=torch.int32)
    order, distinct, starts = KERNELS.sort_reads(rows, slots)
    ascending, expected = torch.sort(rows, stable=True)
    assert torch.equal(order.long(), expected)
    rest, counts = torch.unique_consecutive(ascending, return_counts=True)
    assert torch.equal(distinct, rest.long()) and torch.equal(starts.diff(), counts)


def _train(dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    """A table and all that its optimizer keeps, after 6 steps of two micro-batches."""
    torch.manual_seed(0)
    table = ValueTable(60, 37).to(dtype)
    table.hide()
    optimizer = RowAdam([table], lr=0.05, **options)
    scores = []
    for step in range(6):
        for micro in range(2):
            generator = torch.Generator().manual_seed(2 * step + micro)
            rows = (torch.rand(5, 7, generator=generator) ** 2 * 60).long()
            weights = torch.rand(5, 7, generator=generator).requires_grad_()
            table.weighted_sum(rows, weights).backward(torch.randn(5, 37, generator=generator))
            assert weights.grad is not None
            scores.append(weights.grad)
        optimizer.step()
    state = optimizer.state[table.anchor]
    return [table.weight.float(), *(state[name] for name in sorted(state) if name != "step"), *scores]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
@pytest.mark.parametrize("semantics", ["lazy", "row-step", "catch-up", "dense"])
def test_steps(dtype: torch.dtype, rounding: str, semantics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"rounding": rounding, "semantics": semantics}
    ours = _train(dtype, options)
    monkeypatch.setenv(SWITCH, "plain")
    compiled.cache_clear()
    try:
        assert compiled() == (None, f"{SWITCH}=plain")
        theirs = _train(dtype, options)
    finally:
        compiled.cache_clear()
    # Rounding may go the other way where sums differ in their last bit.
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@needs_compiler
def test_rows_outside_the_table_are_refused() -> None:
    table = ValueTable(5, 4)
    table.hide()
    for row in (5, -1):
        with pytest.raises(IndexError, match="outside the table's 5 rows"):
            table.weighted_sum(torch.tensor([[0, row]]), torch.ones(1, 2))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(_train(torch.float32, {}))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
