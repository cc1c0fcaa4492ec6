"""The memory layer equals its naive twin: outputs, input gradients, gradients of every parameter
and of single table rows.
"""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.models.memory.naive import naive_memory
from memshard.models.memory.peer import Peer
from memshard.models.memory.product_key import ProductKeyMemory, row_slots, slot_rows
from memshard.models.memory.row_gradient import row_gradients
from memshard.models.memory.table import externalize_tables

_SIZES: dict[str, Any] = {
    "dim": 5,
    "keys": 8,
    "heads": 2,
    "topk": 4,
    "key_dim": 6,
    "query_norm": "layer",
}


def _memory(**changes: Any) -> ProductKeyMemory:
    """Return a layer in fp64 with every parameter and statistic away from its initial value."""
    torch.manual_seed(0)
    memory = ProductKeyMemory(**{**_SIZES, **changes}).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for buffer in memory.buffers():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return memory


def _tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 5, dtype=torch.float64, generator=generator).requires_grad_()


def _results(y: Tensor, memory: ProductKeyMemory, x: Tensor) -> list[Tensor]:
    """Return the output and the gradients of a random projection of it, to the input and
    to every parameter.
    """
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad((y * upstream).sum(), [x, *memory.parameters()])]


def _assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(gradient.abs().max() > 0 for gradient in ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("query_norm", ["batch", "layer", "layer-half", "rms", "lagged", "none"])
def test_every_query_norm(query_norm: str, training: bool) -> None:
    memory, x = _memory(query_norm=query_norm).train(training), _tokens(7)
    naive = _results(naive_memory(memory, x), memory, x)
    _assert_same(_results(memory(x), memory, x), naive)


@pytest.mark.parametrize(
    "changes",
    [
        {"topk": 8},
        {"heads": 1},
        {"keys": 7},
        {"keys": 33, "topk": 32},
        {"gate": True},
        {"gate": True, "value_dim": 3, "query_norm": "batch"},
        {"key_dim": 2},
        {"weighting": "sigmoid"},
        {"weighting": "relu"},
    ],
    ids=str,
)
def test_every_size(changes: dict[str, Any]) -> None:
    memory, x = _memory(**changes), _tokens(6)
    _assert_same(_results(memory(x), memory, x), _results(naive_memory(memory, x), memory, x))


@pytest.mark.parametrize("hidden", [False, True])
def test_peer_is_a_sum_of_experts(hidden: bool) -> None:
    """It is compared with each token's experts, one by one; gradients to the input, every parameter
    and both tables agree.
    """
    torch.manual_seed(0)
    peer = Peer(dim=5, keys=4, heads=2, topk=3, key_dim=6, query_norm="layer").double()
    naive, x = deepcopy(peer), _tokens(6)
    tables = externalize_tables(peer) if hidden else []
    y = peer(x)
    rows, weights = naive.lookup(x)
    parts = []
    for token, reads, scores in zip(x, rows, weights, strict=True):
        experts = zip(reads, scores, strict=True)
        parts.append(
            sum(
                w * torch.nn.functional.gelu(naive.down.weight[r] @ token) * naive.values.weight[r]
                for r, w in experts
            )
        )
    expected = torch.stack(parts)  # type: ignore[arg-type]
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    ours, x.grad = x.grad, None
    expected.square().sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-10, atol=1e-10)
    theirs = dict(naive.named_parameters())
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=1e-10, atol=1e-10, msg=name
        )
    if hidden:
        for table, name in zip(tables, ("values.weight", "down.weight"), strict=True):
            gradient = torch.zeros_like(table.weight)
            for distinct, part in row_gradients(table.reads, 3, table.backend):
                gradient[distinct] = part
            torch.testing.assert_close(gradient, theirs[name].grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keys", [1, 8])
def test_topk_1_reads_the_best_slot_of_each_head(keys: int) -> None:
    memory, x = _memory(keys=keys, topk=1, heads=3, gate=True), _tokens(6)
    ours, naive = (_results(y, memory, x) for y in (memory(x), naive_memory(memory, x)))
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-10)
    # A single slot has weight 1 whatever its score: queries and keys cannot learn, values do.
    gradients = dict(zip(dict(memory.named_parameters()), ours[2:], strict=True))
    assert gradients["sub_keys.weight"].abs().max() < 1e-12 < gradients["values.weight"].abs().max()


@pytest.mark.parametrize("topk", [1, 3, 6])
def test_tied_sub_keys_are_read_in_the_documented_order(topk: int) -> None:
    memory = _memory(keys=6, topk=topk, query_norm="none")
    with torch.no_grad():
        # Small whole numbers: sums are exact, so equal scores are equal bits.
        for parameter in (memory.query.weight, memory.query.bias, memory.sub_keys.weight):
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
        memory.sub_keys.weight[:, :, 3:] = memory.sub_keys.weight[:, :, :3]
    x = torch.randint(-1, 2, (40, 5)).double().requires_grad_()
    ours, theirs = (_results(y, memory, x) for y in (memory(x), naive_memory(memory, x)))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_leading_dims_are_tokens() -> None:
    memory, x = _memory(query_norm="batch"), _tokens(2, 3)
    _assert_same(
        _results(memory(x), memory, x),
        _results(naive_memory(memory, x.view(6, 5)).view(2, 3, 5), memory, x),
    )


@pytest.mark.parametrize("query_norm", ["batch", "lagged", "layer"])
def test_padding_is_as_if_it_were_not_there(query_norm: str) -> None:
    memory, x = _memory(query_norm=query_norm, gate=True), _tokens(3, 4)
    padding = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    alone = deepcopy(memory)
    naive = torch.zeros_like(x).index_put((padding,), naive_memory(memory, x[padding]))
    naive_results = _results(naive, memory, x)
    alone(x[padding])
    ours = _results(memory(x, padding), memory, x)
    _assert_same(ours, naive_results)
    assert not ours[0][~padding].any() and not ours[1][~padding].any()
    for (name, with_padding), (_, without) in zip(
        memory.named_buffers(), alone.named_buffers(), strict=True
    ):
        torch.testing.assert_close(with_padding, without, msg=name)


@pytest.mark.parametrize("query_norm", ["batch", "lagged", "layer"])
def test_no_tokens_give_no_gradient_and_no_statistics(query_norm: str) -> None:
    memory = _memory(query_norm=query_norm, gate=True)
    before = {name: buffer.clone() for name, buffer in memory.named_buffers()}
    for x, padding in ((_tokens(0), None), (_tokens(2, 3), torch.zeros(2, 3, dtype=torch.bool))):
        y = memory(x, padding)
        assert y.shape == x.shape
        gradients = torch.autograd.grad(y.sum(), [x, *memory.parameters()], allow_unused=True)
        assert all(gradient is None or not gradient.any() for gradient in gradients)
    assert all(torch.equal(buffer, before[name]) for name, buffer in memory.named_buffers())


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_row_gradients_of_several_reads_are_the_dense_gradient(block: int) -> None:
    """Two passes and two layers share a table; every row comes once, in order, in blocks
    of bounded size.
    """
    first = _memory()
    second = ProductKeyMemory(**_SIZES, values=first.values).double()
    layers = torch.nn.ModuleList([first, second])
    hidden = deepcopy(layers)
    (table,) = externalize_tables(hidden)
    table.has_optimizer = True
    for x in (_tokens(4), _tokens(2, 3), _tokens(0)):
        for layer in (*layers, *hidden):
            layer(x).square().sum().backward()
    visible = dict(layers.named_parameters())
    assert set(visible) - set(dict(hidden.named_parameters())) == {"0.values.weight"}
    for name, parameter in hidden.named_parameters():
        ours, dense = parameter.grad, visible[name].grad
        assert ours is not None and dense is not None and torch.equal(ours, dense), name

    blocks = list(row_gradients(table.reads, block, table.backend))
    rows = torch.cat([rows for rows, _ in blocks])
    assert all(len(rows) <= block for rows, _ in blocks)
    assert rows.diff().gt(0).all()
    gradient = torch.zeros_like(table.weight).index_copy(
        0, rows, torch.cat([gradient for _, gradient in blocks])
    )
    torch.testing.assert_close(gradient, first.values.weight.grad, rtol=1e-10, atol=1e-10)


def test_equal_reads_give_equal_bits() -> None:
    hidden = _memory().float()
    (table,) = externalize_tables(hidden)
    gradients = []
    for _ in range(2):
        hidden(_tokens(50).float()).square().sum().backward()
        gradients.append(
            torch.cat([gradient for _, gradient in row_gradients(table.reads, 16, table.backend)])
        )
        table.drop_reads()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("keys", [1, 4, 7])
def test_storage_order_is_a_permutation_that_spreads_every_sub_key(keys: int) -> None:
    i1, i2 = torch.meshgrid(torch.arange(keys), torch.arange(keys), indexing="ij")
    rows = slot_rows(i1, i2, keys)
    assert sorted(rows.flatten().tolist()) == list(range(keys**2))
    assert torch.equal(row_slots(rows, keys), i1 * keys + i2)
    # Every stretch of `keys` rows that starts at a diagonal holds each first and each second
    # sub-key once.
    for sub_key in range(keys):
        assert (
            (rows[sub_key] // keys).unique().numel()
            == (rows[:, sub_key] // keys).unique().numel()
            == keys
        )
