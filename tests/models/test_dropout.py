import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memshard.models.kernels.dropout import agrees
from memshard.models.random import RandomKey, dropout, plain_dropout
from tests.models.without_gpu import compiled, passed_in_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def _mask(
    samples: list[int],
    step: int = 0,
    layer: int = 0,
    branch: int = 0,
    seed: int = 0,
    start: int = 0,
) -> Tensor:
    x = torch.ones(len(samples), 6, 40)
    positions = torch.arange(start, start + 6).expand(len(samples), -1)
    return dropout(x, 0.3, RandomKey(seed, step, torch.tensor(samples)), positions, layer, branch)


def test_masks_do_not_depend_on_the_split_of_the_batch() -> None:
    whole = _mask([3, 4, 5, 6])
    assert torch.equal(whole, torch.cat((_mask([3]), _mask([4, 5]), _mask([6]))))
    assert torch.equal(whole, _mask([6, 5, 4, 3]).flip(0))


def test_masks_follow_positions() -> None:
    assert torch.equal(_mask([1], start=2)[:, :4], _mask([1])[:, 2:])


@pytest.mark.parametrize(
    "change",
    [{"step": 1}, {"layer": 1}, {"layer": -1}, {"branch": 1}, {"seed": 1}, {"samples": [7, 8, 9]}],
)
def test_masks_differ_in_all_else(change: dict) -> None:
    a, b = _mask([0, 1, 2]), _mask(**({"samples": [0, 1, 2]} | change))
    # Independent masks agree in 0.3^2 + 0.7^2 = 58 % of the places.
    assert 0.5 < (a == b).float().mean() < 0.66


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_expectation(rate: float) -> None:
    x = torch.rand(64, 32, 48, generator=torch.Generator().manual_seed(0)) + 0.5
    y = dropout(x, rate, RandomKey(1, 2, torch.arange(64)), torch.arange(32).expand(64, -1), 0, 0)
    assert abs((y == 0).float().mean() - rate) < 0.005
    assert abs(y.mean() / x.mean() - 1) < 4 * (rate / (1 - rate) / x.numel()) ** 0.5
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - rate))
    for dim in range(3):
        # No place, sample or channel is dropped noticeably more often than others: 5 standard
        # deviations.
        rates = (y == 0).float().mean([d for d in range(3) if d != dim])
        assert (rates - rate).abs().max() < 5 * (
            rate * (1 - rate) * x.shape[dim] / x.numel()
        ) ** 0.5


def test_gradient_passes_where_values_do() -> None:
    x = torch.ones(2, 3, 5, requires_grad=True)
    y = dropout(x, 0.5, RandomKey(0, 0, torch.arange(2)), torch.arange(3).expand(2, -1), 0, 0)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, see the last tests")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_is_plain_torch_in_one_launch(dtype: torch.dtype) -> None:
    from memshard.models.kernels.triton_dropout import dropout as kernel

    assert agrees(kernel, plain_dropout, torch.device("cpu"), dtype)
    assert not agrees(
        lambda x, rate, key, *of: kernel(x, rate, key + 1, *of),
        plain_dropout,
        torch.device("cpu"),
        dtype,
    )
    x = torch.randn(2, 5, 16).to(dtype).requires_grad_()
    draw = 0.5, 7, torch.arange(2), torch.arange(5).expand(2, -1)
    ours, theirs = (
        torch.autograd.grad(drop(x * 1, *draw).float().square().sum(), x)[0]
        for drop in (kernel, plain_dropout)
    )
    assert torch.equal(ours, theirs)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_tritons_interpreter() -> None:
    assert "3 passed" in passed_in_interpreter(__file__, "kernel")


@needs_triton
@pytest.mark.parametrize(
    "capability", ["80", *(pytest.param(x, marks=pytest.mark.slow) for x in ("70", "90", "100"))]
)
def test_the_program_compiles_without_a_gpu(capability: str, tmp_path: Path) -> None:
    assert compiled("compile_dropout.py", capability, tmp_path).split() == ["drop"] * 3
