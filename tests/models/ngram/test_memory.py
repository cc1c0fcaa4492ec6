"""The layer that reads n-grams equals its formulas, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.context import Context
from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.models.ngram.kinds import NgramConfig
from memshard.models.ngram.memory import NgramMemory
from memshard.models.ngram.recent_tokens import TokenWindow

DIM, VOCABULARY = 16, 23


def _formulas(memory: NgramMemory, x: Tensor, tokens: Tensor, window: Tensor) -> Tensor:
    """Return the output by the formulas, one token after the other."""
    rows = memory.addresses(window)

    def root_norm(v: Tensor, norm: torch.nn.Module) -> Tensor:
        return v / (v.square().mean() + 1e-6).sqrt() * norm.weight

    batch = []
    for b in range(len(tokens)):
        outputs, normed = [], []
        for t in range(tokens.shape[1]):
            e, h = torch.cat([memory.values.weight[row] for row in rows[b, t]]), x[b, t]
            if memory.gating == "glu":
                e = F.silu(memory.gate.weight @ h) * e
            y = e if memory.output is None else memory.output.weight @ e
            if memory.gating == "scalar":
                y = memory.scale * y
            if memory.gating == "context":
                k = root_norm(memory.key.weight @ e, memory.key_norm)
                g = k @ root_norm(h, memory.query_norm) / DIM**0.5
                y = y * torch.sigmoid(g.sign() * g.abs().clamp(min=1e-6).sqrt())
            if memory.convolutions:
                normed.append(root_norm(y, memory.convolution_norm))
                kernel, step = memory.convolutions.kernels()[0], memory.addresses.order
                seen = [
                    kernel[:, j] * normed[t - j * step]
                    for j in range(kernel.shape[1])
                    if t >= j * step
                ]
                y = y + F.silu(torch.stack(seen).sum(0))
            outputs.append(y)
        batch.append(torch.stack(outputs))
    return torch.stack(batch)


@pytest.mark.parametrize("gate", ["none", "scalar", "context", "glu"])
@pytest.mark.parametrize("convolution", [0, 3])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_layer_equals_its_formulas(gate: str, convolution: int, hidden: bool) -> None:
    torch.manual_seed(1)
    settings = NgramConfig(
        layers=(0,),
        rule="engram",
        rows=13,
        heads=2,
        value_dim=6,
        token_ids=VOCABULARY,
        gate=gate,
        convolution=convolution,
    )
    memory = NgramMemory(settings, DIM, 0).double()
    with torch.no_grad():
        for weight in memory.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    tokens = torch.randint(VOCABULARY, (2, 9))
    window, _ = TokenWindow(settings, VOCABULARY)(tokens, Context.of(tokens))
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    weights = [
        weight
        for _, weight in sorted(memory.named_parameters())
        if weight is not memory.values.weight
    ]
    expected = _formulas(memory, x, tokens, window)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(
        expected, [x, *weights, memory.values.weight], upstream, allow_unused=True
    )
    if hidden:
        externalize_tables(memory)
    ctx = Context(Context.of(tokens).positions, window=window)
    y, _ = memory(x, ctx)
    torch.testing.assert_close(y, expected)
    y.backward(upstream)
    for actual, gradient in zip([x, *weights], expected_gradients, strict=False):
        if gradient is None:
            assert actual is x and actual.grad is None
        else:
            torch.testing.assert_close(actual.grad, gradient)
    torch.testing.assert_close(_row_gradient(memory.values), expected_gradients[-1])


@pytest.mark.parametrize("gate", ["none", "heads"])
def test_values_of_each_head_are_weighed(gate: str) -> None:
    torch.manual_seed(1)
    settings = NgramConfig(
        layers=(0,), rule="token", place="values", token_ids=VOCABULARY, gate=gate
    )
    memory = NgramMemory(settings, DIM, 0, outputs=8, heads=2).double()
    tokens, x = torch.randint(VOCABULARY, (2, 9)), torch.randn(2, 9, DIM, dtype=torch.float64)
    ctx = Context.of(tokens)
    window, _ = TokenWindow(settings, VOCABULARY)(tokens, ctx)
    y, _ = memory(x, Context(ctx.positions, window=window))
    expected = memory.values.weight[tokens]
    if gate == "heads":
        weights = 3 * torch.sigmoid(x[..., :12] @ memory.head_gate.weight.T)
        expected = torch.cat(
            (expected[..., :4] * weights[..., :1], expected[..., 4:] * weights[..., 1:]), -1
        )
    torch.testing.assert_close(y, expected)


def _row_gradient(table: ValueTable) -> Tensor | None:
    if not table.hidden:
        return table.weight.grad
    dense = torch.zeros_like(table.weight)
    for part in table.gradients(1):
        dense[part.rows] = part.sums(0, len(part.rows))
    return dense


def test_padding_reads_nothing_and_gives_zeros() -> None:
    settings = NgramConfig(layers=(0,), rows=13, heads=2, value_dim=4, token_ids=VOCABULARY)
    memory = NgramMemory(settings, DIM, 0)
    tokens = torch.randint(VOCABULARY, (2, 5))
    padding = torch.tensor([[False, False, True, True, True], [True] * 5])
    ctx = Context(Context.of(tokens).positions, padding=padding)
    window, _ = TokenWindow(settings, VOCABULARY)(tokens, ctx)
    ctx = Context(ctx.positions, padding=padding, window=window)
    externalize_tables(memory)
    y, _ = memory(torch.randn(2, 5, DIM), ctx)
    assert not y[~padding].any() and y[padding].any(-1).all()
    alone = tokens[:1, 2:]
    short = Context.of(alone)
    first, _ = TokenWindow(settings, VOCABULARY)(alone, short)
    assert torch.equal(first, window[:1, 2:])
