"""The way into and out of flash-linear-attention's kernels, by a stand-in with their arguments: the
delta rule, sequence by sequence.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.fast_weights.delta_rule import PLAIN, delta_rule, plain_scan
from memshard.models.kernels import delta_steps
from memshard.models.kernels.fla_delta_rule import by_kernel, choose_kernel, difference
from memshard.models.kernels.scan import agrees
from tests.models.without_gpu import compiled, passed_in_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIZES = ((20, 35, 7), (64, 64, 32))
"""Features, width and tokens of chunks."""
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def _sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor,
    output_final_state: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return tensors [batch, length, heads, ...]; packed, a batch of 1 with the borders of its
    sequences and as many states.
    """
    assert output_final_state and initial_state.dtype == torch.promote_types(v.dtype, torch.float32)
    q, k, v, beta = (
        (scale * q).transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        beta.transpose(1, 2),
    )
    if cu_seqlens is None:
        out, state = delta_rule(q, k, v, beta, initial_state)
        return out.transpose(1, 2), state
    outs, states = [], []
    for number, (first, end) in enumerate(
        zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    ):
        out, state = delta_rule(
            *(x[:, :, first:end] for x in (q, k, v, beta)), initial_state[number : number + 1]
        )
        outs.append(out)
        states.append(state)
    return torch.cat(outs, 2).transpose(1, 2), torch.cat(states)


@pytest.mark.parametrize(
    "borders", [None, [], [(0, 0)], [(1, 0), (1, 5)], [(0, 3), (0, 20), (1, 0), (2, 20)]]
)
def test_packed_sequences_with_states_are_resets(borders: list[tuple[int, int]] | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 21, 8, dtype=torch.float64) for _ in range(3))
    inputs = [
        q,
        F.normalize(k, dim=-1),
        v,
        torch.rand(3, 2, 21, dtype=torch.float64),
        torch.randn(3, 2, 8, 8, dtype=torch.float64),
    ]
    resets = None
    if borders is not None:
        resets = torch.zeros(3, 21, dtype=torch.bool)
        for row, token in borders:
            resets[row, token] = True
    results = []
    for by_library in (True, False):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, state = (
            by_kernel(_sequences, *leaves, resets)
            if by_library
            else delta_rule(*leaves, resets=resets)
        )
        loss = (out * out.detach().cos()).sum() + (state * state.detach().sin()).sum()
        results.append([out, state, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_first_call_finds_wrong_kernels() -> None:
    device = torch.device("cpu")

    def forgets_states(
        *inputs: Tensor, initial_state: Tensor, **named: object
    ) -> tuple[Tensor, Tensor]:
        return _sequences(*inputs, initial_state=0 * initial_state, **named)  # type: ignore[arg-type]

    def scales_queries(*inputs: Tensor, scale: float, **named: object) -> tuple[Tensor, Tensor]:
        return _sequences(*inputs, scale=scale * inputs[0].shape[-1] ** -0.5, **named)  # type: ignore[arg-type]

    def gives_nan(*inputs: Tensor, **named: object) -> tuple[Tensor, Tensor]:
        out, state = _sequences(*inputs, **named)  # type: ignore[arg-type]
        return out * torch.nan, state

    assert difference(_sequences, delta_rule, device, torch.bfloat16, 32, 16) < 0.01
    assert not difference(gives_nan, delta_rule, device, torch.bfloat16, 32, 16) < 1
    assert difference(forgets_states, delta_rule, device, torch.bfloat16, 32, 16) > 0.1
    assert difference(scales_queries, delta_rule, device, torch.bfloat16, 32, 16) > 0.1


def test_other_devices_and_dtypes_take_chunks() -> None:
    kernel, why = choose_kernel(torch.device("cpu"), torch.bfloat16, 32, 16, delta_rule)
    assert kernel is None and "on a GPU" in why
    assert choose_kernel(torch.device("cuda"), torch.float32, 32, 16, delta_rule)[0] is None
    assert choose_kernel(torch.device("cuda"), torch.bfloat16, 512, 16, delta_rule)[0] is None


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, see the next test")
def test_the_scan_of_all_chunks_is_that_of_plain_torch() -> None:
    from memshard.models.kernels.triton_scan import scan

    for sizes in SIZES:
        assert agrees(scan, plain_scan, torch.device("cpu"), *sizes)

    def wrong(state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return scan(2 * state, *rest)

    assert not agrees(wrong, plain_scan, torch.device("cpu"), *SIZES[0])


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, see the next test")
def test_the_steps_of_all_chunks_are_those_of_plain_torch() -> None:
    from memshard.models.kernels.triton_delta import steps

    ours, device = steps(), torch.device("cpu")
    for sizes in SIZES:
        assert delta_steps.agrees(ours, PLAIN, device, *sizes)
    for name, step in ours._asdict().items():
        wrong = ours._replace(**{name: lambda q, *rest, step=step: step(2 * q, *rest)})
        assert not delta_steps.agrees(wrong, PLAIN, device, *SIZES[0]), name


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_tritons_interpreter() -> None:
    assert "2 passed" in passed_in_interpreter(__file__, "all_chunks")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["70", "80", "90", "100"])
def test_chunks_compile_without_a_gpu(capability: str, tmp_path: Path) -> None:
    kernels = compiled("compile_delta.py", capability, tmp_path).split()
    steps = ["solve_chunks", "read_chunks", "begin_gradients", "end_gradients"]
    assert kernels == [*["scan_chunks"] * 4, *steps]
