"""A hidden table learns from a backward pass exactly if it would have as a parameter."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memshard.models.memory.peer import Peer
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.row_gradient import row_gradients
from memshard.models.memory.table import externalize_tables, find_tables
from memshard.models.recompute.checkpointing import Recompute, checkpointed
from memshard.models.transformer import Transformer
from tests.models.tiny import tiny_config, tiny_model, tiny_tokens


class _Model(nn.Module):
    """Two layers that may read the same tables, each of which may be run again in backward."""

    def __init__(self, kind: type[ProductKeyMemory], share: bool, run: Callable[..., Tensor]):
        super().__init__()
        sizes = {"keys": 5, "heads": 2, "topk": 3, "key_dim": 4, "query_norm": "layer"}
        self.start, self.end = nn.Linear(4, 6), nn.Linear(6, 2)
        self.first = kind(6, **sizes)
        names = ("values", "down") if kind is Peer else ("values",)
        shared = {name: getattr(self.first, name) for name in names} if share else {}
        self.second = kind(6, **sizes, **shared)
        self.run = run
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(self.first, self.start(x))
        return self.end(y + self.run(self.second, y))


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _checkpoint(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def _reentrant(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=True)


def _x(seed: int = 0) -> Tensor:
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(seed)).double()


def _loss(model: nn.Module, seed: int = 0) -> Tensor:
    return model(_x(seed)).square().sum()


def _backward(model: _Model) -> None:
    _loss(model).backward()


def _micro_batches(model: _Model) -> None:
    for seed in range(3):
        _loss(model, seed).backward()


def _twice(model: _Model) -> None:
    loss = _loss(model)
    loss.backward(retain_graph=True)
    loss.backward()


def _gradients_of_dense(model: _Model) -> None:
    torch.autograd.grad(_loss(model), [*model.start.parameters()])


def _gradients_of_dense_then_backward(model: _Model) -> None:
    loss = _loss(model)
    torch.autograd.grad(loss, [*model.start.parameters()], retain_graph=True)
    loss.backward()


def _saliency_between_backwards(model: _Model) -> None:
    _loss(model).backward()
    x = _x().requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    _loss(model, 1).backward()


def _backward_to_first_layer(model: _Model) -> None:
    _loss(model).backward(inputs=[*model.start.parameters()])


def _backward_to_last_layer(model: _Model) -> None:
    _loss(model).backward(inputs=[*model.end.parameters()])


def _detached(model: _Model) -> None:
    y = model.start(_x())
    model.end(model.run(model.first, y.detach())).square().sum().backward()


def _frozen(model: _Model) -> None:
    model.requires_grad_(False)
    model.end.requires_grad_(True)
    model.start.requires_grad_(True)
    _loss(model).backward()


def _frozen_as_peft_does(model: _Model) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.start.requires_grad_(True)
    _loss(model).backward()


def _layers_frozen(model: _Model) -> None:
    model.first.requires_grad_(False)
    model.second.requires_grad_(False)
    _loss(model).backward()


def _frozen_and_thawed(model: _Model) -> None:
    model.requires_grad_(False)
    model.end.requires_grad_(True)
    _loss(model).backward()
    model.requires_grad_(True)
    _loss(model).backward()


def _table_frozen(model: _Model) -> None:
    for _, table in find_tables(model):
        table.requires_grad_(False)
    _loss(model).backward()


def _only_tables_learn(model: _Model) -> None:
    model.requires_grad_(False)
    for _, table in find_tables(model):
        table.requires_grad_()
    _loss(model).backward()


_WAYS = [
    _backward,
    _micro_batches,
    _twice,
    _gradients_of_dense,
    _gradients_of_dense_then_backward,
    _saliency_between_backwards,
    _backward_to_first_layer,
    _backward_to_last_layer,
    _detached,
    _frozen,
    _frozen_as_peft_does,
    _layers_frozen,
    _frozen_and_thawed,
    _table_frozen,
    _only_tables_learn,
]
_NOT_REENTRANT = {
    # torch refuses reentrant checkpoints if only some gradients are asked for,
    _gradients_of_dense,
    _gradients_of_dense_then_backward,
    _saliency_between_backwards,
    _backward_to_first_layer,
    _backward_to_last_layer,
    # and warns if their input needs none.
    _detached,
    _frozen_and_thawed,
    _only_tables_learn,
}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of each table, in the form of a parameter's, and of all parameters."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, table in find_tables(model):
        if table.hidden and table.reads:
            dense = torch.zeros_like(table.weight)
            for rows, gradient in row_gradients(table.reads, 100, table.backend):
                dense[rows] = gradient
            gradients[f"{name}.weight"] = dense
    return gradients


def _assert_alike(visible: nn.Module, hidden: nn.Module) -> None:
    expected, actual = _gradients(visible), _gradients(hidden)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def _hide(model: nn.Module, host: bool = False) -> None:
    for table in externalize_tables(model):
        # As RowAdam would say: several passes may follow one another.
        table.has_optimizer, table.host = True, host


@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
@pytest.mark.parametrize(
    ("way", "share", "run"),
    [
        (way, share, run)
        for way in _WAYS
        for share, run in [
            (False, _call),
            (True, _call),
            (True, _checkpoint),
            (True, _reentrant),
            (True, checkpointed),
        ]
        if run is not _reentrant or way not in _NOT_REENTRANT
    ],
)
def test_a_hidden_table_learns_as_a_visible_one(
    way: Callable[[_Model], None], kind: type[ProductKeyMemory], share: bool, run: Any
) -> None:
    visible = _Model(kind, share, run)
    hidden = deepcopy(visible)
    _hide(hidden)
    way(visible)
    way(hidden)
    _assert_alike(visible, hidden)


@pytest.mark.parametrize("way", _WAYS)
def test_a_table_whose_rows_are_fetched_learns_as_a_visible_one(
    way: Callable[[_Model], None],
) -> None:
    visible = _Model(Peer, True, _call)
    hidden = deepcopy(visible)
    _hide(hidden, host=True)
    way(visible)
    way(hidden)
    _assert_alike(visible, hidden)


@pytest.mark.parametrize("only", ["layer", "table", "model"])
def test_what_is_frozen_before_it_is_hidden_stays_frozen(only: str) -> None:
    """Until what froze it is undone."""
    visible = _Model(ProductKeyMemory, True, _call)
    tables = [visible.first, visible.second]
    for part in {"layer": tables, "table": [visible.first.values], "model": [visible]}[only]:
        part.requires_grad_(False)
    visible.end.requires_grad_(True)
    hidden = deepcopy(visible)
    _hide(hidden)
    for model in (visible, hidden):
        _loss(model).backward()
    _assert_alike(visible, hidden)
    assert not hidden.first.values.reads
    for model in (visible, hidden):
        (model.first.values if only == "table" else model).requires_grad_(True)
        _loss(model).backward()
    _assert_alike(visible, hidden)
    assert hidden.first.values.reads


@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
def test_a_table_that_learns_alone_before_it_is_hidden_goes_on(
    kind: type[ProductKeyMemory],
) -> None:
    """As by a regular expression over the names of parameters."""
    visible = _Model(kind, False, _call)
    for name, parameter in visible.named_parameters():
        parameter.requires_grad = "first.values" in name or "end" in name
    hidden = deepcopy(visible)
    _hide(hidden)
    for model in (visible, hidden):
        _loss(model).backward()
    _assert_alike(visible, hidden)
    assert hidden.first.values.reads and not hidden.second.values.reads


@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
def test_a_shared_table_learns_from_the_layers_that_learn(kind: type[ProductKeyMemory]) -> None:
    """Not from a frozen one; whether another's reads count, its flags cannot say. The table's own
    `requires_grad_` decides for both.
    """
    separate, shared = (_Model(kind, share, _call) for share in (False, True))
    separate.load_state_dict(shared.state_dict())
    for model in (separate, shared):
        _hide(model)
        model.first.requires_grad_(False)
        _loss(model).backward()
    actual, expected = _gradients(shared), _gradients(separate)
    torch.testing.assert_close(actual["first.values.weight"], expected["second.values.weight"])
    shared.first.values.requires_grad_(False)
    shared.first.values.drop_reads()
    _loss(shared).backward()
    assert not shared.first.values.reads


def _transformer_ways() -> list[Callable[[Transformer, Tensor], None]]:
    def backward(model: Transformer, loss: Tensor) -> None:
        loss.backward()

    def dense_first(model: Transformer, loss: Tensor) -> None:
        torch.autograd.grad(loss, [model.embedding.weight], retain_graph=True)
        loss.backward()

    def inputs(model: Transformer, loss: Tensor) -> None:
        loss.backward(inputs=[model.embedding.weight, model.blocks[1].memory.query.weight])

    return [backward, dense_first, inputs]


@pytest.mark.parametrize("way", _transformer_ways())
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("residual", "recompute"),
    [
        ("reversible", Recompute()),
        ("reversible", Recompute(chunk=3)),
        ("pre", Recompute("full")),
        ("pre", Recompute("selective", chunk=3)),
    ],
    ids=str,
)
def test_recomputed_blocks_ask_as_others_do(
    way: Callable[[Transformer, Tensor], None], share: bool, residual: Any, recompute: Recompute
) -> None:
    memory = {"share": share, "query_norm": "layer"}
    visible = tiny_model(tiny_config(memory=memory, residual=residual), spread=0.1).train()
    visible.configure(recompute)
    hidden = deepcopy(visible)
    _hide(hidden)
    for model in (visible, hidden):
        way(model, model(tiny_tokens(2, 8))[0].square().sum())
    _assert_alike(visible, hidden)
