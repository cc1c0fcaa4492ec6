"""Private functions of torch answer as we think, and what replaces them gives the same results."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memshard.models import compat


class _Ask(torch.autograd.Function):
    answers: list[bool] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _Ask.answers.append(compat.backward_keeps_graph())
        return gradient


def test_backward_says_whether_it_keeps_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    y = _Ask.apply(torch.ones(2, requires_grad=True)).sum()
    _Ask.answers.clear()
    y.backward(retain_graph=True)
    y.backward()
    assert _Ask.answers == [True, False]
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    assert compat.backward_keeps_graph()


def test_compiled_modules_are_known() -> None:
    plain, compiled = nn.Linear(2, 2), nn.Linear(2, 2)
    compiled.compile(backend="eager")
    assert compat.is_compiled(compiled) and not compat.is_compiled(plain)


def test_gradients_of_an_embedding_bags_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    values, upstream = torch.randn(5, 3), torch.randn(2, 3)
    rows, offsets = torch.tensor([4, 0, 0, 2]), torch.tensor([0, 3])
    bags = torch.tensor([0, 0, 0, 1])
    ours = compat.embedding_bag_weight_gradient(upstream, values, rows, offsets, bags)

    class _Renamed:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "aten", _Renamed())
    without = compat.embedding_bag_weight_gradient(upstream, values, rows, offsets, bags)
    expected = (values[rows] * upstream[bags]).sum(-1)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(without, expected)


def test_backward_says_which_gradients_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (torch.ones(2, requires_grad=True) for _ in "xy")
    answers: list[bool] = []

    class _Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            return x + y

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            answers.append(compat.backward_wants(y))
            assert compat.in_backward()
            return gradient, gradient

    _Both.apply(x, y).sum().backward()
    _Both.apply(x, y).sum().backward(inputs=[x])
    torch.autograd.grad(_Both.apply(x, y).sum(), x)
    torch.autograd.grad(_Both.apply(x, y).sum(), y)
    assert answers == [True, False, False, True] and not compat.in_backward()
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")
    assert compat.backward_wants(y)


def test_transformed_tensors_are_known() -> None:
    seen = torch.func.vmap(lambda x: x * compat.in_transform(x))(torch.ones(2, 1))
    assert seen.all() and not compat.in_transform(torch.ones(2))
