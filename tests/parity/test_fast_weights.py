"""Chunked fast weights are their recurrences, token by token, in fp64."""

import pytest
import torch
from torch import Tensor

from memshard.models.fast_weights.attention_norm import normalised_delta_rule, normalised_sum_rule
from memshard.models.fast_weights.delta_rule import delta_rule
from memshard.models.fast_weights.sum_rule import read_sum, sum_rule, written_sum

BATCH, HEADS, D, M = 2, 3, 6, 5


def _naive(
    rule: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    log_decay: Tensor | None = None,
    resets: Tensor | None = None,
    normalise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute equations 16 to 25 and section 4.2 of Schlag et al. 2021, one token at a time."""
    s = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1] + normalise) if state is None else state
    s, z = (s[..., :-1], s[..., -1]) if normalise else (s, q.new_zeros(*q.shape[:2], q.shape[-1]))
    out = []
    for t in range(q.shape[2]):
        if log_decay is not None:
            s = s * log_decay[:, :, t, None, None].exp()
        if resets is not None:
            fresh = ~resets[:, t, None, None]
            s, z = s * fresh[..., None], z * fresh
        key, written = k[:, :, t], v[:, :, t]
        if rule == "delta":
            divisor = (z * key).sum(-1, keepdim=True)
            old = torch.einsum("bhdm,bhd->bhm", s, key)
            written = beta[:, :, t, None] * (
                written - (old / torch.where(divisor > 0, divisor, 1) if normalise else old)
            )
        s, z = s + key[..., None] * written[..., None, :], z + key
        read = torch.einsum("bhdm,bhd->bhm", s, q[:, :, t])
        out.append(read / ((z * q[:, :, t]).sum(-1, keepdim=True) + 1e-6) if normalise else read)
    return torch.stack(out, 2), torch.cat((s, z[..., None]), -1) if normalise else s


def _inputs(length: int, positive: bool = False, scale: float = 1.0) -> list[Tensor]:
    """Return q, k (of norm 1 and `scale`), v, beta as leaves."""
    torch.manual_seed(length)
    q, k = (torch.randn(BATCH, HEADS, length, D, dtype=torch.float64) for _ in range(2))
    q, k = (x.abs() if positive else x for x in (q, k))
    tensors = (
        q,
        scale * torch.nn.functional.normalize(k, dim=-1),
        torch.randn(BATCH, HEADS, length, M).double(),
    )
    return [
        x.requires_grad_()
        for x in (*tensors, torch.rand(BATCH, HEADS, length, dtype=torch.float64))
    ]


def _same(
    ours: tuple[Tensor, Tensor],
    naive: tuple[Tensor, Tensor],
    inputs: list[Tensor],
    tolerance: float = 1e-12,
) -> None:
    torch.testing.assert_close(ours, naive, rtol=tolerance, atol=tolerance)
    probes = [torch.randn_like(x) for x in naive]
    gradients = [
        torch.autograd.grad(
            [(x * probe).sum() for x, probe in zip(pair, probes, strict=True)],
            inputs,
            allow_unused=True,
        )
        for pair in (ours, naive)
    ]
    torch.testing.assert_close(
        *(list(g) for g in gradients), rtol=10 * tolerance, atol=10 * tolerance
    )


@pytest.mark.parametrize("rule", ["delta", "sum"])
@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 1), (5, 32), (37, 1), (37, 4), (64, 32), (130, 128)]
)
def test_rules(rule: str, decays: bool, resets: bool, length: int, chunk: int) -> None:
    q, k, v, beta = _inputs(length)
    state = torch.randn(BATCH, HEADS, D, M, dtype=torch.float64, requires_grad=True)
    log_decay = -torch.rand(BATCH, HEADS, length, dtype=torch.float64) if decays else None
    borders = torch.rand(BATCH, length) < 0.2 if resets else None
    inputs = [q, k, v, state]
    if rule == "delta":
        inputs.append(beta)
    if log_decay is not None:
        inputs.append(log_decay.requires_grad_())
    if rule == "delta":
        ours = delta_rule(q, k, v, beta, state, log_decay, borders, chunk)
    else:
        ours = sum_rule(q, k, v, state, log_decay, borders, chunk)
    _same(ours, _naive(rule, q, k, v, beta, state, log_decay, borders), inputs)


@pytest.mark.parametrize("rule", ["delta", "sum"])
@pytest.mark.parametrize("carried", [False, True])
def test_attention_normalisation(rule: str, carried: bool) -> None:
    q, k, v, beta = _inputs(70, positive=True)
    borders = torch.rand(BATCH, 70) < 0.1
    state = (
        torch.rand(BATCH, HEADS, D, M + 1, dtype=torch.float64, requires_grad=True)
        if carried
        else None
    )
    inputs = (
        [q, k, v] + ([beta] if rule == "delta" else []) + ([state] if state is not None else [])
    )
    ours = (
        normalised_delta_rule(q, k, v, beta, state, borders)
        if rule == "delta"
        else normalised_sum_rule(q, k, v, state, borders)
    )
    _same(ours, _naive(rule, q, k, v, beta, state, resets=borders, normalise=True), inputs, 1e-10)


def test_linear_attention_that_sees_all_keys() -> None:
    q, k, v, _ = _inputs(9, positive=True)
    q = q[:, :, :4]
    real = torch.rand(BATCH, 9) < 0.7
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k) * real[:, None, None]
    naive = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    ours = read_sum(q, written_sum(k, v, real)).to(v.dtype)
    _same((ours, ours), (naive, naive), [q, k, v])


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_repeated_keys_at_the_ends_of_beta(strength: float) -> None:
    q, k, v, _ = _inputs(130)
    k = k[:, :, :1].expand(-1, -1, 130, -1).detach().clone().requires_grad_()
    beta = torch.full((BATCH, HEADS, 130), strength, dtype=torch.float64, requires_grad=True)
    _same(delta_rule(q, k, v, beta), _naive("delta", q, k, v, beta), [q, k, v, beta], 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype) -> None:
    """fp32 keeps to 1e-5 over 5,000 tokens, halves to their rounding; the state stays fp32."""
    exact = _inputs(5000 if dtype == torch.float32 else 300)
    low = [x.detach().to(dtype).requires_grad_() for x in exact]
    out, state = delta_rule(*low)
    assert out.dtype == dtype and state.dtype == torch.float32
    expected = _naive("delta", *(x.detach().double() for x in low))
    torch.testing.assert_close(state.double(), expected[1], rtol=1e-5, atol=1e-5)
    size = float(expected[0].abs().max())
    assert (out.double() - expected[0]).abs().max() <= size * max(1e-5, torch.finfo(dtype).eps)


def test_zero_keys_write_nothing() -> None:
    q, k, v, beta = (x.detach() for x in _inputs(40))
    state = torch.randn(BATCH, HEADS, D, M, dtype=torch.float64)
    assert torch.equal(delta_rule(q, torch.zeros_like(k), v, beta, state)[1], state)


def test_gradients_by_finite_differences() -> None:
    q, k, v, beta = _inputs(7, scale=0.9)
    state = torch.randn(BATCH, HEADS, D, M, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: delta_rule(*x, chunk=3), (q, k, v, beta, state), fast_mode=True
    )
