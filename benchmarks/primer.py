"""Primer's parts, forward and backward, beside what one would write without them: grouped conv1d, relu(x).square().

    OMP_NUM_THREADS=1 python benchmarks/primer.py

Medians of interleaved runs on one thread, of processor time, and ratios to ours; then the memory that autograd keeps of each.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.convolution import causal_convolution
from memshard.models.squared_relu import squared_relu

Function = Callable[..., Tensor]
_WIDTH = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"torch": torch.__version__, "runs": args.runs}
    for shape in ((8, 256, 512), (8, 128, 128), (2, 2048, 512)):
        x, kernel = torch.randn(shape, requires_grad=True), torch.randn(shape[2], _WIDTH, requires_grad=True)
        documents = (torch.arange(shape[1]) // 100).expand(shape[:2])
        functions: dict[str, Function] = {
            "ours": causal_convolution,
            "ours, packed documents": lambda x, kernel, documents=documents: causal_convolution(x, kernel, documents),
            "grouped conv1d": _grouped,
            "padded slices": _slices,
        }
        _agree({name: function for name, function in functions.items() if "documents" not in name}, [x, kernel])
        result[f"convolution of {_WIDTH}, {shape}"] = measure(functions, [x, kernel], args.runs)
    for size in ((2048, 2048), (8192, 512)):
        functions = {
            "ours": squared_relu,
            "relu(x).square()": lambda x: F.relu(x).square(),
            "h = relu(x); h * h": _product,
            "gelu, for comparison": lambda x: F.gelu(x, approximate="tanh"),
        }
        x = torch.randn(size, requires_grad=True)
        _agree({name: function for name, function in functions.items() if "gelu" not in name}, [x])
        result[f"squared ReLU, {size}"] = measure(functions, [x], args.runs)
    for title, rows in result.items():
        if isinstance(rows, dict):
            print(title)
            for name, row in rows.items():
                spread = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
                kept = f"{row['kept_mb']:>9.1f} MB kept in {row['kept']:.0f}"
                print(f"  {name:<24}{row['ms']:>9.2f} ms ({spread}){row['ratio']:>8.2f}x{kept}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(functions: dict[str, Function], inputs: list[Tensor], runs: int) -> dict[str, dict[str, float]]:
    """Of every function the median, lowest and highest milliseconds of forward and backward, the median ratio to ours, run by run, and
    what autograd keeps, in megabytes and tensors.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    upstream = torch.randn_like(inputs[0])
    for turn in range(runs + 1):
        for name, function in functions.items():
            begun = time.process_time()
            torch.autograd.grad(function(*inputs), inputs, upstream)
            if turn:
                seconds[name].append(time.process_time() - begun)
    found = {}
    for name, times in seconds.items():
        kept = _kept(functions[name], inputs)
        found[name] = {
            "ms": statistics.median(times) * 1e3,
            "low_ms": min(times) * 1e3,
            "high_ms": max(times) * 1e3,
            "ratio": statistics.median(time / ours for time, ours in zip(times, seconds["ours"], strict=True)),
            "kept_mb": sum(kept) / 1e6,
            "kept": float(len(kept)),
        }
    return found


def _kept(function: Function, inputs: list[Tensor]) -> list[int]:
    """Bytes of each distinct storage that autograd holds for backward, parameters' left out."""
    blocks: dict[int, int] = {}

    def hold(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in {parameter.untyped_storage().data_ptr() for parameter in inputs[1:]}:
            blocks[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        out = function(*inputs)
    del out
    return list(blocks.values())


def _agree(functions: dict[str, Function], inputs: list[Tensor]) -> None:
    """AssertionError if the functions do not compute the same."""
    with torch.no_grad():
        for function in functions.values():
            torch.testing.assert_close(function(*inputs), functions["ours"](*inputs), rtol=1e-4, atol=1e-4)


def _grouped(x: Tensor, kernel: Tensor) -> Tensor:
    lags = kernel.shape[1]
    return F.conv1d(x.mT, kernel.flip(1)[:, None], padding=lags - 1, groups=len(kernel))[..., : x.shape[1]].mT


def _slices(x: Tensor, kernel: Tensor) -> Tensor:
    lags, length = kernel.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, lags - 1, 0))
    shifted = [padded[:, lags - 1 - lag : lags - 1 - lag + length] * kernel[:, lag] for lag in range(lags)]
    return sum(shifted[1:], shifted[0])


def _product(x: Tensor) -> Tensor:
    h = F.relu(x)
    return h * h


if __name__ == "__main__":
    main()
