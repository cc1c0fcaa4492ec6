"""Primer's parts, forward and backward, beside what one would write without them: grouped conv1d,
relu(x).square().

    OMP_NUM_THREADS=1 python -m memshard.bench.primer

Medians of interleaved runs on one thread, of processor time, and ratios to ours; then the memory
that autograd keeps of each.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.bench.common.side_by_side import Function, check_equal, measure, table
from memshard.models.layers.convolution import causal_convolution
from memshard.models.layers.squared_relu import squared_relu

_WIDTH = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"torch": torch.__version__, "runs": args.runs}
    for shape in ((8, 256, 512), (8, 128, 128), (2, 2048, 512)):
        x, kernel = (
            torch.randn(shape, requires_grad=True),
            torch.randn(shape[2], _WIDTH, requires_grad=True),
        )
        documents = (torch.arange(shape[1]) // 100).expand(shape[:2])
        functions: dict[str, Function] = {
            "ours": causal_convolution,
            "ours, packed documents": lambda x, kernel, documents=documents: causal_convolution(
                x, kernel, documents
            ),
            "grouped conv1d": _grouped,
            "padded slices": _slices,
        }
        check_equal(
            {name: function for name, function in functions.items() if "documents" not in name},
            [x, kernel],
            1e-4,
            1e-4,
        )
        result[f"convolution of {_WIDTH}, {shape}"] = measure(
            functions, [x, kernel], args.runs, parameters=1
        )
    for size in ((2048, 2048), (8192, 512)):
        functions = {
            "ours": squared_relu,
            "relu(x).square()": lambda x: F.relu(x).square(),
            "h = relu(x); h * h": _product,
            "gelu, for comparison": lambda x: F.gelu(x, approximate="tanh"),
        }
        x = torch.randn(size, requires_grad=True)
        check_equal(
            {name: function for name, function in functions.items() if "gelu" not in name},
            [x],
            1e-4,
            1e-4,
        )
        result[f"squared ReLU, {size}"] = measure(functions, [x], args.runs)
    for title, rows in result.items():
        if isinstance(rows, dict):
            print(title)
            print(table(rows))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _grouped(x: Tensor, kernel: Tensor) -> Tensor:
    lags = kernel.shape[1]
    return F.conv1d(x.mT, kernel.flip(1)[:, None], padding=lags - 1, groups=len(kernel))[
        ..., : x.shape[1]
    ].mT


def _slices(x: Tensor, kernel: Tensor) -> Tensor:
    lags, length = kernel.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, lags - 1, 0))
    shifted = [
        padded[:, lags - 1 - lag : lags - 1 - lag + length] * kernel[:, lag] for lag in range(lags)
    ]
    return sum(shifted[1:], shifted[0])


def _product(x: Tensor) -> Tensor:
    h = F.relu(x)
    return h * h


if __name__ == "__main__":
    main()
