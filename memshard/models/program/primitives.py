"""The primitives of Primer's search space (So et al. 2021), mapped to torch.

A value is [batch, length, width], or [batch, branches, length, width] inside a branched call; the
width of scores is the length. Axes, epsilons and the behaviour at 0 are our choice, since the
paper's code was never published.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.layers.convolution import causal_convolution
from memshard.models.layers.squared_relu import squared_relu


@dataclass(frozen=True)
class Primitive:
    """A torch function of `inputs` values.

    takes: its argument in an instruction, a constant or a width, if any. parameter: what it learns:
    one number a channel (vector), a map between widths (matrix) or a filter for each channel
    (depthwise). kernel: number of positions that a filter spans.
    """

    function: Callable[..., Tensor]
    inputs: int = 1
    takes: Literal["", "constant", "width"] = ""
    parameter: Literal["", "vector", "matrix", "depthwise"] = ""
    kernel: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


def abs_root(x: Tensor) -> Tensor:
    """Return the root of |x| + 1e-5 (LayerNorm's epsilon in torch): its gradient at 0 is finite."""
    return torch.sqrt(torch.abs(x) + 1e-5)


def log_abs(x: Tensor) -> Tensor:
    """Return the logarithm of |x| + 1e-5, which is finite at 0."""
    return torch.log(torch.abs(x) + 1e-5)


def reciprocal(x: Tensor) -> Tensor:
    """Return 1 / x, and 0 at 0; gradients stay finite."""
    # Twice where: with 1 / 0 in the branch not taken, its gradient would be 0 x inf = NaN.
    zero = x == 0
    return torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, x))


def at_least(x: Tensor, bound: float) -> Tensor:
    """Return x, or the bound where x is less."""
    # relu's backward reads its result, which is kept anyway; clamp's would keep x as well.
    return torch.relu(x) if bound == 0 else torch.clamp_min(x, bound)


def scale(x: Tensor, weight: Tensor) -> Tensor:
    """Return x times one number a channel. weight: [branches * width]."""
    return x * (weight if x.ndim == 3 else weight.view(x.shape[1], 1, -1))


def shift(x: Tensor, weight: Tensor) -> Tensor:
    """Return x plus one number a channel. weight: [branches * width]."""
    return x + (weight if x.ndim == 3 else weight.view(x.shape[1], 1, -1))


def transposed_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T, the scores of every position of a with every position of b."""
    return a @ b.mT


def project(x: Tensor, weight: Tensor, branches: int) -> Tensor:
    """Apply a linear map in every branch. x: one value for all branches, or one for each; weight:
    [branches * outputs, width].
    """
    if x.ndim == 4:
        # b batch, r branches, t positions, d inputs, e outputs: each branch has its own matrix.
        return torch.einsum("brtd,red->brte", x, weight.unflatten(0, (branches, -1)))
    y = F.linear(x, weight)
    return y if branches == 1 else y.unflatten(-1, (branches, -1)).transpose(1, 2)


def convolve(x: Tensor, weight: Tensor, branches: int) -> Tensor:
    """Apply a causal convolution in every branch. weight: [branches * outputs, width, kernel], the
    newest position last.
    """
    # conv1d wants [batch, channels, length]; branches become groups of channels. Zeros on the left
    # alone make it causal.
    flat = x.mT.flatten(1, -2) if x.ndim == 4 else x.mT
    y = F.conv1d(
        F.pad(flat, (weight.shape[-1] - 1, 0)), weight, groups=branches if x.ndim == 4 else 1
    )
    return y.mT if branches == 1 else y.unflatten(1, (branches, -1)).mT


def depthwise(x: Tensor, weight: Tensor, size: int) -> Tensor:
    """Apply a causal filter to each channel. weight: [branches * width * size], the newest position
    of each channel first.
    """
    # Branches side by side as channels, for the mixers' convolution: padded slices by branch were
    # part of why a compiled Primer-EZ took 1.42 times the compiled Transformer's step, now 1.2.
    rows = x if x.ndim == 3 else x.transpose(1, 2).flatten(2)
    y = causal_convolution(rows, weight.view(-1, size))
    return y if x.ndim == 3 else y.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


_MOVES = ("MASK", "FIT", "LIFT", "JOIN")  # compute nothing
_RED: Mapping[str, Any] = {"dim": -1, "keepdim": True}
_TIME: Mapping[str, Any] = {"dim": -2}

PRIMITIVES: dict[str, Primitive] = {
    "ADD": Primitive(torch.add, 2),
    "DIFFERENCE": Primitive(torch.sub, 2),
    "DIVIDE": Primitive(torch.div, 2),
    "MULTIPLY": Primitive(torch.mul, 2),
    "ABS_ROOT": Primitive(abs_root),
    "SQUARE": Primitive(torch.square),
    "EXP": Primitive(torch.exp),
    "LOG": Primitive(log_abs),
    "ABS": Primitive(torch.abs),
    "SIGN": Primitive(torch.sign),
    "COS": Primitive(torch.cos),
    "SIN": Primitive(torch.sin),
    "TANH": Primitive(torch.tanh),
    "SIGMOID": Primitive(torch.sigmoid),
    "RECIP": Primitive(reciprocal),
    "C_MUL": Primitive(torch.mul, takes="constant"),
    "MAX": Primitive(at_least, takes="constant"),
    "MIN": Primitive(torch.clamp_max, takes="constant"),
    "SCALE": Primitive(scale, parameter="vector"),
    "SHIFT": Primitive(shift, parameter="vector"),
    # Zeros, not -inf: softmax is built as EXP, MASK, RED_SUM, DIVIDE.
    "MASK": Primitive(torch.tril),
    "CUM_SUM": Primitive(torch.cumsum, options=_TIME),
    "CUM_PROD": Primitive(torch.cumprod, options=_TIME),
    "RED_MEAN": Primitive(torch.mean, options=_RED),
    "RED_SUM": Primitive(torch.sum, options=_RED),
    "RED_MIN": Primitive(torch.amin, options=_RED),
    "RED_MAX": Primitive(torch.amax, options=_RED),
    "RED_PROD": Primitive(torch.prod, options=_RED),
    "MAT_MUL": Primitive(torch.matmul, 2),
    "T_MAT_MUL": Primitive(transposed_matmul, 2),
    "CONV_1X1": Primitive(project, takes="width", parameter="matrix"),
    **{
        f"CONV_{size}X1": Primitive(convolve, takes="width", parameter="matrix", kernel=size)
        for size in (3, 7, 15, 31)
    },
    **{
        f"DCONV_{size}X1": Primitive(depthwise, parameter="depthwise", kernel=size)
        for size in (3, 7, 15, 31)
    },
}
COMMUTATIVE = frozenset({"ADD", "MULTIPLY"})
PRODUCTS = frozenset(
    {"T_MAT_MUL", "MAT_MUL", "ATTEND", "SQUARED_RELU"}
    | {name for name, op in PRIMITIVES.items() if op.kernel > 1 or op.parameter == "matrix"}
)
"""Operations that run in half precision where the model does."""
_HALF = (torch.float16, torch.bfloat16)


def cast(op: str, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return an operation's inputs in the precision it computes in. dtype: of the block's input.

    Norms are made of primitives, and their squares overflow fp16, their differences of means are
    noise in bf16. So everything but products is fp32 at least.
    """
    if op in PRODUCTS:
        return [x.to(dtype) for x in inputs] if dtype in _HALF else list(inputs)
    return [x.float() if x.dtype in _HALF and op not in _MOVES else x for x in inputs]


def attend(q: Tensor, k: Tensor, v: Tensor, factor: float) -> Tensor:
    """Return causal softmax attention with scores factor q k^T, by the fused kernel."""
    if q.ndim == 3:
        # The fused kernel wants a dimension of heads.
        return attend(q[:, None], k[:, None], v[:, None], factor)[:, 0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=factor)


def fit(x: Tensor, width: int) -> Tensor:
    """Return the first `width` channels, starting again with the first if there are fewer."""
    if x.shape[-1] < width:
        x = torch.cat([x] * -(-width // x.shape[-1]), dim=-1)
    return x[..., :width]


def lift(x: Tensor, factor: int) -> Tensor:
    """Repeat a value for each of `factor` branches."""
    return (
        x.unsqueeze(1).expand(-1, factor, -1, -1)
        if x.ndim == 3
        # Copies of a branch are neighbours, as `join` expects them.
        else x.repeat_interleave(factor, dim=1)
    )


def join(x: Tensor, factor: int) -> Tensor:
    """Concatenate the channels of `factor` branches."""
    if x.shape[1] == factor:
        return x.transpose(1, 2).flatten(2)
    # [batch, outer * factor, length, width] to [batch, outer, length, factor * width]
    return x.unflatten(1, (-1, factor)).transpose(2, 3).flatten(3)


GLUE: dict[str, Primitive] = {
    "ATTEND": Primitive(attend, 3, takes="constant"),
    "SQUARED_RELU": Primitive(squared_relu),
    "FIT": Primitive(fit, takes="width"),
    "LIFT": Primitive(lift, takes="width"),
    "JOIN": Primitive(join, takes="width"),
}
"""Operations that compiling adds to a program."""
