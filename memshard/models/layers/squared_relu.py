"""Squared ReLU (Primer, So et al. 2021): max(x, 0)^2."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LARGEST_FP16 = 255.875
"""The largest fp16 number whose square is one, too."""


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2; backward keeps max(x, 0) alone.

    fp16 holds squares up to 65,504: inputs above 255.875 count as that number, in backward too, so
    they never give infinity.
    """
    return _SquaredReLU.apply(x)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp(0, _LARGEST_FP16) if x.dtype == torch.float16 else x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2)
