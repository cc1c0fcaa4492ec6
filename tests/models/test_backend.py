"""Every row backend equals plain torch: sums, gradients, order of reads, steps of every semantics.

This process tests the compiled kernels of the CPU. Triton decides when it is imported whether to
compile or to interpret, so the last tests run this file again in a process of its own: in Triton's
interpreter, and on a GPU where there is one.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.models.kernels import plain_rows
from memshard.models.kernels.backend import SWITCH, backend_for
from memshard.models.memory.row_gradient import Read, sort_reads
from memshard.models.memory.table import ValueTable
from memshard.trainer.optim.rows.adam import RowAdam
from memshard.trainer.optim.rows.step import Step
from tests.models.without_gpu import ROOT, compiled

DEVICE = torch.device(os.environ.get("KERNELS_ON", "cpu"))
BACKEND, WHY = backend_for(DEVICE)
TRITON = "Triton" in WHY
INTERPRETED = TRITON and DEVICE.type == "cpu"
needs_kernels = pytest.mark.skipif(BACKEND is plain_rows, reason=WHY)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or "KERNELS_ON" in os.environ,
    reason="needs triton: pip install --no-deps triton==3.7.1; not repeated in its own process",
)
# The interpreter computes with numpy, and what it leaves out as well: 0 / 0 beyond the last column.
numpy_overflows = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VALUES = [(torch.float32, "master"), *product(DTYPES[1:], ["master", "stochastic"])]
STEPS = [
    (semantics, *values)
    for semantics in ("lazy", "row-step", "catch-up", "dense")
    for values in VALUES
    if semantics == "lazy" or values == VALUES[-1] or not INTERPRETED  # which takes 10 ms a row
]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 15, 16, 37, 64])
@pytest.mark.parametrize("lengths", [(0, 0), (3, 0, 1, 9), (5,), (4, 8), ()], ids=str)
def test_sums_and_score_gradients(dtype: torch.dtype, dim: int, lengths: tuple[int, ...]) -> None:
    reads = sum(lengths)
    values = torch.randn(11, dim, device=DEVICE).to(dtype)
    rows, weights = torch.randint(11, (reads,), device=DEVICE), torch.randn(reads, device=DEVICE)
    upstream = torch.randn(len(lengths), dim, device=DEVICE)
    offsets = torch.tensor(
        [sum(lengths[:bag]) for bag in range(len(lengths))], dtype=torch.int64, device=DEVICE
    )
    ours = (
        BACKEND.gather_sum(values, rows, weights, offsets),
        BACKEND.score_gradients(values, rows, offsets, upstream),
    )
    theirs = (
        plain_rows.gather_sum(values, rows, weights, offsets),
        plain_rows.score_gradients(values, rows, offsets, upstream),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if TRITON:
        # Kernels of GPUs take gradients in bf16, and sum in fp32 all the same.
        narrow = upstream.bfloat16()
        wide = plain_rows.score_gradients(values, rows, offsets, narrow.float())
        scores = BACKEND.score_gradients(values, rows, offsets, narrow)
        torch.testing.assert_close(scores, wide, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_sums_of_wide_rows() -> None:
    """The rows are wider than one program's columns."""
    values, rows, weights = (
        torch.randn(5, 2100, device=DEVICE),
        torch.tensor([4, 0, 4], device=DEVICE),
        torch.randn(3, device=DEVICE),
    )
    offsets, upstream = torch.tensor([0, 2], device=DEVICE), torch.randn(2, 2100, device=DEVICE)
    ours = (
        BACKEND.gather_sum(values, rows, weights, offsets),
        BACKEND.score_gradients(values, rows, offsets, upstream),
    )
    theirs = (
        plain_rows.gather_sum(values, rows, weights, offsets),
        plain_rows.score_gradients(values, rows, offsets, upstream),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    "lengths", [(3, 0, 700, 2, 256, 900, 1), (256, 256), (5,), (0, 0), ()], ids=str
)
@pytest.mark.parametrize("part", [slice(None), slice(1, -1)], ids=["all", "middle"])
def test_segment_sums(lengths: tuple[int, ...], part: slice) -> None:
    """Rows have few reads, or more than one program sums; they are all rows of a step, or a block
    of them.
    """
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    reads, starts = sum(lengths), ends[part] if len(lengths) > 2 else ends
    values, rows, weights = (
        torch.randn(9, 20, device=DEVICE),
        torch.randint(9, (reads,), device=DEVICE),
        torch.randn(reads, device=DEVICE),
    )
    ours, theirs = (
        BACKEND.segment_sums(values, rows, weights, starts),
        plain_rows.segment_sums(values, rows, weights, starts),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    ("reads", "slots"), [(0, 5), (1, 1), (100, 7), (5000, 2**31 - 1), (3000, 2048), (3000, 2049)]
)
def test_order_of_reads(reads: int, slots: int) -> None:
    rows = torch.randint(slots, (reads,), dtype=torch.int32, device=DEVICE)
    ascending, expected = torch.sort(rows, stable=True)
    rest, counts = torch.unique_consecutive(ascending, return_counts=True)
    for sort in (BACKEND.sort_reads, plain_rows.sort_reads_on_device):
        order, distinct, starts = sort(rows, slots)
        assert torch.equal(order.long(), expected)
        # On a GPU nobody asks how many there are: the last one is repeated, without reads.
        assert len(distinct) in (len(rest), min(reads, slots))
        assert (distinct[len(rest) :] == ascending[-1:]).all()
        assert not starts.diff()[len(rest) :].any() and starts[-1] == reads
        assert torch.equal(distinct[: len(rest)].long(), rest.long())
        assert torch.equal(starts.diff()[: len(rest)], counts)


def _train(dtype: torch.dtype, options: dict[str, Any], plainly: bool = False) -> list[Tensor]:
    """Return a table and all that its optimizer keeps, after some steps of two micro-batches."""
    torch.manual_seed(0)
    slots, steps = (12, 2) if INTERPRETED else (60, 6)
    table = ValueTable(slots, 37).to(DEVICE, dtype)
    table.hide()
    assert table.backend is backend_for(DEVICE)[0]
    if plainly:
        table.backend = plain_rows
    optimizer = RowAdam([table], lr=0.05, **options)
    scores = []
    for step in range(steps):
        for micro in range(2):
            generator = torch.Generator().manual_seed(2 * step + micro)
            rows = (torch.rand(5, 7, generator=generator) ** 2 * slots).long().to(DEVICE)
            weights = torch.rand(5, 7, generator=generator).to(DEVICE).requires_grad_()
            table.weighted_sum(rows, weights).backward(
                torch.randn(5, 37, generator=generator).to(DEVICE)
            )
            assert weights.grad is not None
            scores.append(weights.grad)
        optimizer.step()
    state = optimizer.state[table.anchor]
    return [
        table.weight.float(),
        *(state[name] for name in sorted(state) if name != "step"),
        *scores,
    ]


@needs_kernels
@pytest.mark.parametrize(("semantics", "dtype", "rounding"), STEPS)
def test_steps(dtype: torch.dtype, rounding: str, semantics: str) -> None:
    options = {"rounding": rounding, "semantics": semantics}
    ours, theirs = _train(dtype, options), _train(dtype, options, plainly=True)
    # Rounding may go the other way where sums differ in their last bit.
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    # With other random bits half of the values would differ; the interpreter cuts fp32 off where it
    # makes bf16 of it.
    cut = INTERPRETED and dtype == torch.bfloat16 and rounding == "master"
    if dtype != torch.float32 and not cut:
        assert (ours[0] == theirs[0]).float().mean() > 0.95


@pytest.mark.skipif(not TRITON, reason="kernels of the CPU want fp32")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_on_a_gradient_in_bf16_is_that_on_the_same_numbers_in_fp32(
    dtype: torch.dtype,
) -> None:
    slots, dim = 9, 37
    rows = torch.randint(slots, (300,), device=DEVICE)
    read = Read(
        rows,
        torch.randn(300, device=DEVICE),
        torch.arange(0, 300, 50, device=DEVICE),
        torch.randn(6, dim, device=DEVICE).bfloat16(),
    )
    tables = []
    for upstream in (read.upstream, read.upstream.float()):
        table = ValueTable(slots, dim).to(DEVICE, dtype)
        table.hide()
        torch.manual_seed(0)
        table.reset_parameters()
        optimizer = RowAdam([table], rounding="stochastic")
        reads = sort_reads([read], BACKEND, slots)
        assert reads is not None
        step = Step("lazy", 1, 0.1, 0.9, 0.99, 1e-8)
        state = optimizer.state[table.anchor]
        BACKEND.adam_rows(step.update(table, state, replace(reads, upstream=upstream)))
        tables.append((table.weight.float(), state["exp_avg"], state["exp_avg_sq"]))
    torch.testing.assert_close(*tables, rtol=0, atol=0)


def _rounded(values: Tensor, lr: float, gradient: Tensor, backend: Any = BACKEND) -> Tensor:
    """Return a table of these values after a step of -lr times the sign of a gradient, exactly,
    that is rounded at random. gradient: powers of two, or 0 with lr 0.
    """
    table = ValueTable(*values.shape).to(DEVICE, values.dtype)
    table.hide()
    table.weight.copy_(values)
    table.backend = backend
    # Without moments and eps the quotient is 1 or -1.
    optimizer = RowAdam([table], lr, (0.0, 0.0), eps=0.0 if lr else 1.0, rounding="stochastic")
    rows = torch.arange(len(values), device=DEVICE)[:, None]
    weights = torch.ones_like(rows, dtype=torch.float32)
    table.weighted_sum(rows, weights).backward(gradient.to(DEVICE))
    optimizer.step()
    return table.weight.cpu()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_random_rounding_leaves_a_value_that_does_not_change(dtype: torch.dtype) -> None:
    """Zero of either sign and values below the normal range included."""
    values = torch.randn(8 if INTERPRETED else 1000, 2048)
    values[0, :4] = torch.tensor([0.0, -0.0, 3e-7, -3e-7])
    values = values.to(dtype)
    after = _rounded(values, 0.0, torch.zeros(values.shape))
    assert torch.equal(values.view(torch.int16), after.view(torch.int16))


@numpy_overflows
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_random_rounding_makes_nothing_infinite_that_to_the_nearest_is_finite(
    dtype: torch.dtype,
) -> None:
    largest = torch.finfo(dtype).max
    half = 2.0 ** (4 if dtype == torch.float16 else 119)
    values = torch.tensor([largest, -largest]).to(dtype)[:, None].expand(2, 2048)
    away = -values.float().sign()
    assert torch.equal(_rounded(values, half * 0.99, away), values)
    # What is further away becomes infinite at random, as it does to the nearest.
    infinite = _rounded(values, half * 1.5, away).isinf()
    assert 0.7 < infinite.float().mean() < 0.8


@numpy_overflows
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_random_rounding_is_the_same_bits_on_every_backend(dtype: torch.dtype) -> None:
    shape = (8, 300) if INTERPRETED else (300, 300)
    values = (torch.randn(shape) * (torch.randn(shape) * 6).exp()).to(dtype)
    signs = torch.randint(2, shape).float() * 2 - 1
    ours, theirs = (_rounded(values, 0.0371, signs, each) for each in (BACKEND, plain_rows))
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def test_the_switch_keeps_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "plain")
    assert backend_for.__wrapped__(DEVICE) == (plain_rows, f"plain torch ({SWITCH}=plain)")


@needs_kernels
def test_what_kernels_do_not_serve_goes_to_plain_torch() -> None:
    """That is fp64, rows without columns, weights of another dtype."""
    rows, offsets = torch.tensor([0, 2, 2], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    for values, dtype in (
        (torch.randn(3, 5, dtype=torch.float64), torch.float64),
        (torch.randn(3, 0), torch.float32),
        (torch.randn(3, 5), torch.float64),
    ):
        reads = values.to(DEVICE), rows, torch.randn(3, dtype=dtype, device=DEVICE)
        ours, theirs = BACKEND.gather_sum(*reads, offsets), plain_rows.gather_sum(*reads, offsets)
        assert ours.dtype == dtype and torch.equal(ours, theirs)
        upstream = torch.randn(2, values.shape[1], dtype=dtype, device=DEVICE)
        ours = BACKEND.score_gradients(reads[0], rows, offsets, upstream)
        assert torch.equal(ours, plain_rows.score_gradients(reads[0], rows, offsets, upstream))


@needs_kernels
def test_the_choice_does_not_depend_on_torchs_defaults() -> None:
    """A table may be built while another dtype or device is the default."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert backend_for.__wrapped__(DEVICE)[1] == WHY
    finally:
        torch.set_default_dtype(torch.float32)


@needs_kernels
def test_rows_outside_the_table_are_refused() -> None:
    """Triton's are not waited for, so they cannot raise."""
    table = ValueTable(5, 4).to(DEVICE)
    table.hide()
    for row in (5, -1):
        rows, weights = torch.tensor([[0, row]], device=DEVICE), torch.ones(1, 2, device=DEVICE)
        if TRITON:
            assert table.weighted_sum(rows, weights).isnan().all()
            assert table.dot(rows, torch.ones(1, 4, device=DEVICE)).isnan().tolist() == [
                [False, True]
            ]
        else:
            with pytest.raises(IndexError, match="outside the table's 5 rows"):
                table.weighted_sum(rows, weights)


@pytest.mark.skipif(TRITON, reason="of the CPU")
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


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_tables_of_more_values_than_int32_counts() -> None:
    """The last rows of a large table, and the same rows as a small one: reads, gradients and
    randomly rounded steps agree.
    """
    rows = 2**21 + 8
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    results = []
    for first in (0, rows - 8):
        with torch.device("meta"):
            table = ValueTable(rows, 1024, local_rows=range(first, rows))
        table.hide()
        table.to(torch.float16).to_empty(device=DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(0)
        table.weight[-8:] = torch.randn(8, 1024, generator=generator, device=DEVICE)
        optimizer = RowAdam([table], lr=0.05, rounding="stochastic")
        weights = torch.rand(3, 4, generator=generator, device=DEVICE).requires_grad_()
        read = torch.randint(rows - 8, rows, (3, 4), generator=generator, device=DEVICE) - first
        sums = table.weighted_sum(read, weights)
        sums.sum().backward()
        optimizer.step()
        assert weights.grad is not None
        results.append([sums.detach(), weights.grad, table.weight[-8:].clone()])
        del table, optimizer
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _run_again(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(__file__)]
    # Also where this process is told to use plain torch.
    inherited = {name: value for name, value in os.environ.items() if name != SWITCH}
    done = subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    # Skipped tests say that plain torch runs, and why.
    assert "passed" in done.stdout and "plain torch" not in done.stdout, done.stdout


@needs_triton
def test_in_tritons_interpreter() -> None:
    _run_again(TRITON_INTERPRET="1", KERNELS_ON="cpu")


@needs_triton
@pytest.mark.parametrize(
    "capability",
    ["80", *(pytest.param(x, marks=pytest.mark.slow) for x in ("70", "75", "90", "100"))],
)
def test_triton_kernels_compile_without_a_gpu(capability: str, tmp_path: Path) -> None:
    names = compiled("compile_triton.py", capability, tmp_path).split()
    assert names == [
        "adam_rows",
        "gather_sum",
        "score_gradients",
        "segment_sums",
        "window_sums",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or "KERNELS_ON" in os.environ, reason="needs a CUDA device"
)
def test_on_a_gpu() -> None:
    if torch.cuda.get_device_capability() < (7, 0):
        pytest.skip("needs compute capability 7.0")
    _run_again(TRITON_INTERPRET="0", KERNELS_ON="cuda")
