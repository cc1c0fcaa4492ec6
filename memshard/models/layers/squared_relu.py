"""Squared ReLU (Primer, So et al. 2021): max(x, 0)^2."""

from typing import Any

import torch
from torch import Tensor

from memshard.models.once import Saved, differentiable_once

_LARGEST_FP16 = 255.875
"""The largest fp16 number whose square is finite in fp16."""


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0)^2; backward keeps only max(x, 0).

    fp16 represents squares up to 65,504. Larger inputs than 255.875 count as that number, in
    backward as well, so that they never give infinity.
    """
    return _SquaredReLU.apply(x)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp(0, _LARGEST_FP16) if x.dtype == torch.float16 else x.relu()
        # Not the square, which the next matrix keeps anyway: torch's root of it takes 22 times as
        # long as a product where half of the values are 0.
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, gradient: Tensor) -> Tensor:
        (positive,) = saved
        return (gradient * positive).mul_(2)
