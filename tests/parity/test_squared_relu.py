"""Squared ReLU against torch's own operations, with one tensor kept."""

import pytest
import torch
from torch import Tensor

from memshard.models.layers.squared_relu import squared_relu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype: torch.dtype) -> None:
    x = torch.randn(40, 7, dtype=torch.float64).to(dtype)
    x[0], x[1] = 0, -0.0
    x, probe = x.requires_grad_(), torch.randn(40, 7).to(dtype)
    naive = (x.double() * (x.double() > 0)) ** 2
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).smallest_normal}
    torch.testing.assert_close(squared_relu(x).double(), naive, **tolerance)
    ours, theirs = (torch.autograd.grad((y * probe).sum(), x)[0] for y in (squared_relu(x), naive))
    torch.testing.assert_close(ours, theirs, **tolerance)


def test_one_tensor_is_kept() -> None:
    kept: list[Tensor] = []
    x = torch.randn(5, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        squared_relu(x)
    assert len(kept) == 1


def test_fp16_does_not_overflow() -> None:
    """If the square does not fit, value and gradient are those of the largest input
    whose square does.
    """
    x = torch.tensor(
        [-1e4, 255.875, 256.0, 300.0, 6e4, float("nan")], dtype=torch.float16, requires_grad=True
    )
    y = squared_relu(x)
    assert y[:5].tolist() == [0, *[65472] * 4] and y[5].isnan()
    y[:5].sum().backward()
    assert x.grad is not None and x.grad[:5].tolist() == [0, *[511.75] * 4]
    wide = x.detach().bfloat16()
    assert squared_relu(wide)[4] > 3e9
