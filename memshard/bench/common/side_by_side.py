"""Functions that compute the same, side by side: time of forward and backward, and the memory that
autograd keeps.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from memshard.experiments.common.clock import interleave
from memshard.experiments.common.repeated import ratios

Function = Callable[..., Tensor]


def measure(
    functions: dict[str, Function], inputs: Sequence[Tensor], rounds: int, parameters: int = 0
) -> dict[str, dict[str, float]]:
    """Time forward and backward of every function in interleaved rounds.

    Return for each the median, lowest and highest milliseconds of processor time, the median ratio
    to the first function in the same round, and what autograd keeps, in megabytes and tensors.

    parameters: how many of the last inputs are parameters, which are in memory anyway.
    """
    # As a layer above would send it. The gradient of `sum()` would be one number, expanded with
    # stride 0, for which torch takes other paths.
    upstream = torch.randn_like(next(iter(functions.values()))(*inputs))

    def forward_and_backward(function: Function) -> None:
        # Not `backward`, which would add to .grad from the second round on: a pass over memory that
        # is none of the function's.
        torch.autograd.grad(function(*inputs), inputs, upstream)

    seconds = interleave(
        {name: partial(forward_and_backward, function) for name, function in functions.items()},
        rounds,
    )
    first = next(iter(seconds.values()))
    rows = {}
    for name, times in seconds.items():
        kept = _kept(functions[name], inputs, parameters)
        rows[name] = {
            "ms": statistics.median(times) * 1e3,
            "low_ms": min(times) * 1e3,
            "high_ms": max(times) * 1e3,
            "ratio": statistics.median(ratios(times, first)),
            "kept_mb": sum(kept) / 1e6,
            "kept": float(len(kept)),
        }
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return a line of text for each function."""
    lines = []
    for name, row in rows.items():
        low_high = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
        lines.append(
            f"  {name:<32}{row['ms']:>9.2f} ms "
            f"({low_high}){row['ratio']:>8.2f}x{row['kept_mb']:>9.1f} MB kept in {row['kept']:.0f}"
        )
    return "\n".join(lines)


def check_equal(
    functions: dict[str, Function], inputs: Sequence[Tensor], relative: float, absolute: float
) -> None:
    """Raise AssertionError if the functions do not compute the same."""
    with torch.no_grad():
        first, *others = (function(*inputs) for function in functions.values())
        for other in others:
            torch.testing.assert_close(other, first, rtol=relative, atol=absolute)


def _kept(function: Function, inputs: Sequence[Tensor], parameters: int) -> list[int]:
    """Return the bytes of each storage that autograd keeps for backward, without parameters."""
    # By the address of storage: views of one array are counted once.
    left_out = {
        parameter.untyped_storage().data_ptr() for parameter in inputs[len(inputs) - parameters :]
    }
    blocks: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in left_out:
            blocks[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = function(*inputs)
    del out
    return list(blocks.values())
