"""Primer's parts, forward and backward, against what one would write without them: grouped conv1d,
relu(x).square().

    OMP_NUM_THREADS=1 memshard bench primer

Medians of interleaved rounds on one thread, in processor time, and ratios to ours; then the memory
that autograd keeps.
"""

import argparse
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.bench.common.side_by_side import Function, check_equal, measure, table
from memshard.models.layers.convolution import causal_convolution
from memshard.models.layers.squared_relu import squared_relu

_WIDTH = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--rounds", type=int, default=31, help="interleaved rounds whose median counts (default 31)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure convolutions and squared ReLU at several shapes."""
    torch.set_num_threads(1)
    tables = {}
    for shape in ((8, 256, 512), (8, 128, 128), (2, 2048, 512)):
        x = torch.randn(shape, requires_grad=True)
        kernel = torch.randn(shape[2], _WIDTH, requires_grad=True)
        # Documents of 100 tokens: a boundary inside every row, and none where one ends.
        documents = (torch.arange(shape[1]) // 100).expand(shape[:2])
        equal: dict[str, Function] = {
            "ours": causal_convolution,
            "grouped conv1d": _grouped,
            "padded slices": _slices,
        }
        # Not bit-equal: three products are added in another order.
        check_equal(equal, [x, kernel], 1e-4, 1e-4)
        packed = {"ours, packed documents": partial(causal_convolution, documents=documents)}
        tables[f"convolution of {_WIDTH}, {shape}"] = measure(
            equal | packed, [x, kernel], args.rounds, parameters=1
        )
    for size in ((2048, 2048), (8192, 512)):
        equal = {
            "ours": squared_relu,
            "relu(x).square()": lambda x: F.relu(x).square(),
            "h = relu(x); h * h": _product,
        }
        x = torch.randn(size, requires_grad=True)
        check_equal(equal, [x], 1e-4, 1e-4)
        gelu = {"gelu, for comparison": lambda x: F.gelu(x, approximate="tanh")}
        tables[f"squared ReLU, {size}"] = measure(equal | gelu, [x], args.rounds)
    return {"torch": torch.__version__, "rounds": args.rounds, "tables": tables}


def show(result: dict[str, Any]) -> None:
    """Print a table for each shape."""
    for title, rows in result["tables"].items():
        print(title)
        print(table(rows))


def _grouped(x: Tensor, kernel: Tensor) -> Tensor:
    lags = kernel.shape[1]
    # conv1d correlates and pads both ends: the filter is turned round so that lag 0 comes last, and
    # what the padding at the right adds is cut off.
    return F.conv1d(x.mT, kernel.flip(1)[:, None], padding=lags - 1, groups=len(kernel))[
        ..., : x.shape[1]
    ].mT


def _slices(x: Tensor, kernel: Tensor) -> Tensor:
    lags, length = kernel.shape[1], x.shape[1]
    # Zeros before the first token only: no output sees a later one.
    padded = F.pad(x, (0, 0, lags - 1, 0))
    shifted = [
        padded[:, lags - 1 - lag : lags - 1 - lag + length] * kernel[:, lag] for lag in range(lags)
    ]
    return sum(shifted[1:], shifted[0])


def _product(x: Tensor) -> Tensor:
    h = F.relu(x)
    return h * h
