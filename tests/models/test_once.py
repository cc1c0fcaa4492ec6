"""Second derivatives are right, or refused."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.tiny import MIXERS, tiny_config, tiny_model, tiny_tokens

_STEP = 1e-6


def _gradients(model: nn.Module, weights: Sequence[Tensor], create_graph: bool) -> Sequence[Tensor]:
    loss = model(tiny_tokens(2, 8))[0].square().mean()
    gradients = torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True)
    return [
        torch.zeros_like(weight) if gradient is None else gradient
        for weight, gradient in zip(weights, gradients, strict=True)
    ]


_LINEAR: dict[str, Any] = {"memory": {"layers": ()}, "mixer": {"kind": "linear"}}
_MODELS: dict[str, dict[str, Any]] = {
    **{name: {"memory": {"layers": ()}, "mixer": mixer} for name, mixer in MIXERS.items()},
    "squared ReLU": {**_LINEAR, "activation": "squared_relu"},
    "memory": _LINEAR | {"memory": {}},
    "reversible": {**_LINEAR, "residual": "reversible"},
}


@pytest.mark.parametrize("name", _MODELS)
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    """Also of `torch.autograd.grad`, which goes around an error that torch would leave there."""
    model = tiny_model(tiny_config(**_MODELS[name]))
    weights = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(x.shape, dtype=x.dtype, generator=generator) * _STEP for x in weights]
    first = _gradients(model, weights, create_graph=True)
    torch.testing.assert_close(first, _gradients(model, weights, create_graph=False))
    product = sum((gradient * by).sum() for gradient, by in zip(first, direction, strict=True))
    assert isinstance(product, Tensor)
    try:
        second = torch.autograd.grad(product, weights, allow_unused=True)
    except RuntimeError as error:
        # torch's own attention, and ours.
        if re.search("is not implemented|have no second derivative", str(error)):
            return
        raise
    with torch.no_grad():
        for weight, by in zip(weights, direction, strict=True):
            weight += by
    there = _gradients(model, weights, create_graph=False)
    with torch.no_grad():
        for weight, by in zip(weights, direction, strict=True):
            weight -= 2 * by
    back = _gradients(model, weights, create_graph=False)
    for ahead, behind, exact in zip(there, back, second, strict=True):
        exact = torch.zeros_like(ahead) if exact is None else exact
        torch.testing.assert_close((ahead - behind) / 2, exact, rtol=1e-3, atol=1e-10)
