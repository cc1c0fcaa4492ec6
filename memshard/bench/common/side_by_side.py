"""Functions that compute the same, side by side: time of forward and backward, and what autograd
keeps.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor]


def measure(
    functions: dict[str, Function], inputs: Sequence[Tensor], runs: int, parameters: int = 0
) -> dict[str, dict[str, float]]:
    """Of every function the median, lowest and highest milliseconds of processor time, forward and
    backward, in interleaved runs after one that does not count; the median ratio to the first
    function, run by run; and what autograd keeps, in megabytes and tensors.

    parameters: how many of the last inputs are parameters, which are there anyway.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    upstream = torch.randn_like(next(iter(functions.values()))(*inputs))
    for turn in range(runs + 1):
        for name, function in functions.items():
            begun = time.process_time()
            torch.autograd.grad(function(*inputs), inputs, upstream)
            if turn:
                seconds[name].append(time.process_time() - begun)
    first = next(iter(seconds.values()))
    found = {}
    for name, times in seconds.items():
        kept = _kept(functions[name], inputs, parameters)
        found[name] = {
            "ms": statistics.median(times) * 1e3,
            "low_ms": min(times) * 1e3,
            "high_ms": max(times) * 1e3,
            "ratio": statistics.median(
                time / ours for time, ours in zip(times, first, strict=True)
            ),
            "kept_mb": sum(kept) / 1e6,
            "kept": float(len(kept)),
        }
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    """A line a function."""
    lines = []
    for name, row in rows.items():
        spread = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
        lines.append(
            f"  {name:<32}{row['ms']:>9.2f} ms "
            f"({spread}){row['ratio']:>8.2f}x{row['kept_mb']:>9.1f} MB kept in {row['kept']:.0f}"
        )
    return "\n".join(lines)


def check_equal(
    functions: dict[str, Function], inputs: Sequence[Tensor], relative: float, absolute: float
) -> None:
    """AssertionError if the functions do not compute the same."""
    with torch.no_grad():
        first, *others = (function(*inputs) for function in functions.values())
        for other in others:
            torch.testing.assert_close(other, first, rtol=relative, atol=absolute)


def _kept(function: Function, inputs: Sequence[Tensor], parameters: int) -> list[int]:
    """Bytes of each distinct storage that autograd holds for backward, parameters' left out."""
    left_out = {
        parameter.untyped_storage().data_ptr() for parameter in inputs[len(inputs) - parameters :]
    }
    blocks: dict[int, int] = {}

    def hold(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in left_out:
            blocks[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        out = function(*inputs)
    del out
    return list(blocks.values())
