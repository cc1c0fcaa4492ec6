"""The search that stores no scores equals plain torch and the naive layer: rows, ties, weights, and
gradients of inputs and parameters.

Triton decides when it is imported whether to compile or to interpret, so the last tests run this
file again in a process of its own: in Triton's interpreter, and on a GPU where there is one.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.models.kernels.backend import SWITCH, _lookup, lookup_for
from memshard.models.kernels.self_test import lookup_agrees
from memshard.models.memory import look_up as look_up_module
from memshard.models.memory import product_key
from memshard.models.memory.key_use import KeyUse
from memshard.models.memory.naive import naive_memory
from memshard.models.memory.product_key import (
    ProductKeyMemory,
    half_scores,
    slot_rows,
    weigh,
)
from memshard.models.memory.product_topk import product_topk
from memshard.models.recompute.replay import Replay
from tests.models.without_gpu import ROOT, compiled

DEVICE = torch.device(os.environ.get("KERNELS_ON", "cpu"))
in_its_process = pytest.mark.skipif(
    "KERNELS_ON" not in os.environ, reason="runs in a process of its own, started below"
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or "KERNELS_ON" in os.environ,
    reason="needs triton; not repeated in its own process",
)
SIZES: dict[str, Any] = {"dim": 5, "keys": 8, "heads": 2, "topk": 4, "key_dim": 6}


def _by_plain_torch(
    queries: Tensor, sub_keys: Tensor, k: int, weighting: str
) -> tuple[Tensor, Tensor]:
    scores, i1, i2 = product_topk(*half_scores(queries.float(), sub_keys), k)
    return slot_rows(i1, i2, sub_keys.shape[2]), weigh(scores, weighting)


def _with_gradients(
    found: tuple[Tensor, Tensor], leaves: tuple[Tensor, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return rows, weights and the gradients of a random projection of the weights."""
    rows, weights = found
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(weights.shape, generator=generator).to(DEVICE)
    return rows, [weights, *torch.autograd.grad(weights, leaves, upstream)]


@in_its_process
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "key_dim", "keys", "k", "weighting", "dtypes"),
    [
        (5, 2, 6, 8, 4, "softmax", (torch.float32, torch.float32)),
        (3, 1, 2, 1, 1, "sigmoid", (torch.float32, torch.float32)),
        # More tokens and sub-keys than a tile has, and widths that fill none.
        (35, 1, 70, 70, 5, "relu", (torch.bfloat16, torch.float32)),
        (2, 1, 34, 40, 33, "softmax", (torch.float16, torch.bfloat16)),
        (2, 1, 16, 64, 64, "sigmoid", (torch.float32, torch.float16)),
    ],
)
def test_rows_weights_and_gradients(
    tokens: int,
    heads: int,
    key_dim: int,
    keys: int,
    k: int,
    weighting: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    tied: bool,
) -> None:
    generator = torch.Generator().manual_seed(keys)
    draws = (
        torch.randn(tokens, heads, key_dim, generator=generator),
        torch.randn(heads, 2, keys, key_dim // 2, generator=generator),
    )
    if tied:
        # Whole numbers: sums are exact in any order, and many are equal.
        draws = draws[0].clamp(-1, 1).round(), draws[1].clamp(-1, 1).round()
    queries, sub_keys = (
        x.to(DEVICE, dtype).requires_grad_() for x, dtype in zip(draws, dtypes, strict=True)
    )
    lookup = lookup_for(queries, sub_keys, k)
    assert lookup is not None
    leaves = queries, sub_keys
    rows, ours = _with_gradients(
        look_up_module.look_up(lookup, queries, sub_keys, k, weighting), leaves
    )
    right, theirs = _with_gradients(_by_plain_torch(queries, sub_keys, k, weighting), leaves)
    assert torch.equal(rows, right)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-5 if a.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@in_its_process
def test_sub_keys_that_16_bits_do_not_number() -> None:
    queries = torch.randn(2, 8, 2, device=DEVICE, requires_grad=True)
    sub_keys = torch.randn(8, 2, 2048, 1, device=DEVICE)
    upstream = torch.randn(2, 8, 3, device=DEVICE)
    rows, weights = _by_plain_torch(queries, sub_keys, 3, "softmax")
    lookup = lookup_for(queries, sub_keys, 3)
    assert lookup is not None
    arguments = (queries.detach(), sub_keys, rows.int(), weights.detach(), upstream)
    ours, _ = lookup.gradients(*arguments, "softmax", wanted=(True, False))
    torch.testing.assert_close(ours, *torch.autograd.grad(weights, queries, upstream))


def _memory(**changes: Any) -> ProductKeyMemory:
    torch.manual_seed(0)
    memory = ProductKeyMemory(**{"query_norm": "layer", **SIZES, **changes}).to(DEVICE)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return memory


def _tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 5, generator=generator).to(DEVICE).requires_grad_()


def _results(y: Tensor, memory: ProductKeyMemory, x: Tensor) -> list[Tensor]:
    upstream = torch.linspace(-1, 2, y.numel(), device=DEVICE, dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad((y * upstream).sum(), [x, *memory.parameters()])]


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with every search that stores no scores."""
    made: list[int] = []
    search = look_up_module._search

    def counted(*arguments: Any) -> Tensor:
        made.append(1)
        return search(*arguments)

    monkeypatch.setattr(look_up_module, "_search", counted)
    return made


@in_its_process
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"query_norm": "batch", "gate": True, "value_dim": 3},
        {"weighting": "sigmoid"},
        {"weighting": "relu"},
    ],
    ids=str,
)
def test_the_layer_is_its_naive_twin(changes: dict[str, Any], searches: list[int]) -> None:
    memory, x = _memory(**changes), _tokens(6)
    ours = _results(memory(x), memory, x)
    assert searches
    theirs = _results(naive_memory(memory, x), memory, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@in_its_process
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_in_half_precision(
    dtype: torch.dtype, searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, x = _memory().to(dtype), _tokens(6).detach().to(dtype).requires_grad_()
    ours = _results(memory(x), memory, x)
    assert searches
    monkeypatch.setattr(product_key, "lookup_for", lambda *arguments: None)
    theirs = _results(memory(x), memory, x)
    # A bf16 sum of sub-key gradients may round to the neighbour.
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@in_its_process
def test_reads_are_counted_and_balance_scores_all_sub_keys(
    searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, x = _memory(), _tokens(6)
    counts = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(product_key, "lookup_for", lambda *arguments: None)
        memory.key_use = use = KeyUse(2, 8, DEVICE)
        memory(x)
        counts.append(use._reads)
    assert torch.equal(*counts) and counts[0].sum() == 6 * 2 * 2 * 4
    monkeypatch.undo()
    use.balance = 0.1
    done = len(searches)
    memory(x)
    assert len(searches) == done


@in_its_process
def test_a_repeated_pass_searches_once(searches: list[int]) -> None:
    memory, x = _memory(), _tokens(6)
    once = _results(memory(x), memory, x)
    replay = Replay()
    with torch.no_grad():
        memory(x, replay=replay)
    with replay.repeat():
        again = _results(memory(x, replay=replay), memory, x)
    assert len(searches) == 2
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@in_its_process
@pytest.mark.parametrize("precision", ["tf32", "bf16x3"])
def test_scores_on_tensor_cores(precision: str) -> None:
    """Rounding leaves small whole numbers as they are; for others three bf16 products make up."""
    generator = torch.Generator().manual_seed(0)
    queries, sub_keys = (
        torch.randn(shape, generator=generator).to(DEVICE) for shape in ((5, 1, 6), (1, 2, 9, 3))
    )
    if precision == "tf32":
        queries, sub_keys = queries.round(), sub_keys.round()
    lookup = lookup_for(queries, sub_keys, 4, precision)
    assert lookup is not None
    rows, weights = look_up_module.look_up(lookup, queries, sub_keys, 4, "softmax", precision)
    right, expected = _by_plain_torch(queries, sub_keys, 4, "softmax")
    assert torch.equal(rows, right)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-3)


@in_its_process
# The interpreter computes with numpy, which says so.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_scores_that_are_not_numbers_stay_inside_the_table() -> None:
    sub_keys = torch.ones(1, 2, 9, 3, device=DEVICE)
    sub_keys[:, :, ::2] = -torch.inf
    queries = torch.ones(4, 1, 6, device=DEVICE)
    queries[1], queries[2, :, :3], queries[3] = torch.nan, torch.inf, -torch.nan
    lookup = lookup_for(queries, sub_keys, 5)
    assert lookup is not None
    rows, _ = look_up_module.look_up(lookup, queries, sub_keys, 5, "softmax")
    assert rows.min() >= 0 and rows.max() < 81


@in_its_process
def test_no_tokens_and_frozen_parts(searches: list[int]) -> None:
    memory, x = _memory(), _tokens(0)
    assert all(not gradient.any() for gradient in _results(memory(x), memory, x)[1:])
    memory, x = _memory(), _tokens(3)
    whole = _results(memory(x), memory, x)
    memory.sub_keys.requires_grad_(False)
    (alone,) = torch.autograd.grad(
        (memory(x) * torch.linspace(-1, 2, 15, device=DEVICE).view(3, 5)).sum(), [x]
    )
    assert torch.equal(alone, whole[1]) and len(searches) == 3


@in_its_process
def test_the_search_proves_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loses a read is not used, nor any where plain torch is asked for."""
    queries, sub_keys = torch.zeros(3, 1, 6, device=DEVICE), torch.zeros(1, 2, 8, 3, device=DEVICE)
    right = lookup_for(queries, sub_keys, 4)
    assert right is not None
    search, gradients = right.look_up, right.gradients
    for refused in (
        lookup_for(queries.double(), sub_keys, 4),
        lookup_for(queries, sub_keys.double(), 4),
        lookup_for(queries, torch.zeros(1, 2, 80, 3, device=DEVICE), 65),
        lookup_for(queries.to("meta"), sub_keys, 4),
    ):
        assert refused is None

    class Wrong:
        def look_up(self, *arguments: Any) -> Tensor:
            return search(*arguments).roll(1, -1)

        def gradients(self, *arguments: Any) -> tuple[Tensor | None, Tensor | None]:
            return gradients(*arguments)

    assert not lookup_agrees(Wrong(), DEVICE, "fp32")  # type: ignore[arg-type]
    monkeypatch.setenv(SWITCH, "plain")
    assert _lookup.__wrapped__(DEVICE, "fp32") is None


def test_a_cpu_scores_all_sub_keys() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert lookup_for(torch.zeros(3, 1, 6), torch.zeros(1, 2, 8, 3), 4) is None


def _run_again(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(__file__)]
    # Also where this process is told to use plain torch.
    inherited = {name: value for name, value in os.environ.items() if name != SWITCH}
    done = subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout, done.stdout


@needs_triton
def test_in_tritons_interpreter() -> None:
    _run_again(TRITON_INTERPRET="1", KERNELS_ON="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or "KERNELS_ON" in os.environ, reason="needs a CUDA device"
)
def test_on_a_gpu() -> None:
    _run_again(TRITON_INTERPRET="0", KERNELS_ON="cuda")


@needs_triton
@pytest.mark.parametrize(
    "capability",
    ["80", *(pytest.param(c, marks=pytest.mark.slow) for c in ("70", "75", "90", "100"))],
)
def test_kernels_of_the_search_compile_without_spilling(capability: str, tmp_path: Path) -> None:
    """At the size of a memory of a million slots; registers leave room for 12 warps or more."""
    lines = [
        line.split() for line in compiled("compile_search.py", capability, tmp_path).splitlines()
    ]
    assert {line[0] for line in lines} == {"best_sub_keys", "best_pairs", "merge_reads"}
    for name, _, registers, spilled in lines:
        assert int(spilled) == 0, (name, spilled)
        assert int(registers) * 32 * 12 <= 65536, (name, registers)
