"""Dropout in one launch, and one in backward, which draws the mask again instead of keeping it."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memshard.models.kernels.triton_random import random_bits

_WIDTH = 1024


@triton.jit(do_not_specialize=["key", "least"])
def drop(x, out, samples, positions, key, least, kept, length, dim, count, WIDTH: tl.constexpr):
    """Write x / kept where the element's 31 bits are at least `least`, and 0 elsewhere. count:
    number of elements.
    """
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    mask = place < count
    token = place // dim
    sample = tl.load(samples + token // length, mask=mask, other=0)
    position = tl.load(positions + token, mask=mask, other=0)
    bits = random_bits(key, sample, position * dim + place % dim)
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    value = tl.where((bits & 0x7FFFFFFF).to(tl.int32) >= least, tl.div_rn(value, kept), 0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


def dropout(x: Tensor, rate: float, key: int, samples: Tensor, positions: Tensor) -> Tensor:
    """Do what `random.plain_dropout` does."""
    y: Tensor = _Dropout.apply(x, rate, key, samples, positions)
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *draw: Any) -> Tensor:
        ctx.draw = draw
        return dropped(x, *draw)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return dropout(upstream, *ctx.draw), None, None, None, None


def dropped(x: Tensor, rate: float, key: int, samples: Tensor, positions: Tensor) -> Tensor:
    """Do what `dropout` does, without a gradient."""
    x, samples, positions = x.contiguous(), samples.contiguous(), positions.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            drop[(triton.cdiv(x.numel(), _WIDTH),)](
                x,
                out,
                samples,
                positions,
                key,
                int(rate * (1 << 31)),
                1 - rate,
                x.shape[1],
                x.shape[2],
                x.numel(),
                WIDTH=_WIDTH,
            )
    return out
