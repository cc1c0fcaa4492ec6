"""Write a program as a torch module that a person can read, run and take away."""

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.layers import squared_relu as fast
from memshard.models.program import primitives
from memshard.models.program.program import OPERATIONS, Node, Program

_HEAD = '''"""{title}"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


'''


def source(
    program: Program,
    title: str = "One block of a decoder found by search; x: [batch, length, {width}].",
) -> str:
    """Return a Python file with the module `Block`, which needs nothing but torch."""
    # A dict, not a set: the functions are written in the order of their first use, the
    # same every time.
    used = dict.fromkeys(OPERATIONS[node.op].function for node in program.nodes)
    shown = [_PLAIN.get(function, function) for function in used if not _is_torchs(function)]
    if primitives.depthwise in used:
        # `depthwise` calls it by this name, which there is the fast one.
        shown.insert(0, causal_convolution)
    # Their own text rather than a copy of it, which could fall behind.
    functions = "\n\n\n".join(inspect.getsource(function).rstrip() for function in shown)
    names = _names(program)
    init = [
        f"        self.{names[number]}_weight = nn.Parameter({_start(node)})"
        for number, node in program.values()
        if node.shape
    ]
    lines = [_line(program, number, node, names) for number, node in program.values()]
    return (
        _HEAD.format(title=title.format(width=program.width))
        + (f"{functions}\n\n\n" if functions else "")
        + "class Block(nn.Module):\n"
        + (
            "    def __init__(self) -> None:\n        super().__init__()\n"
            + "\n".join(init)
            + "\n\n"
            if init
            else ""
        )
        + "    def forward(self, x: Tensor) -> Tensor:\n"
        + "\n".join(lines)
        + f"\n        return {names[len(program.nodes)]}\n"
    )


def causal_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """y[t] = sum of kernel[:, j] x[t - j]. x: [batch, length, channels]; kernel: [channels,
    size].
    """
    length = x.shape[1]
    return sum(
        (
            F.pad(x, (0, 0, lag, 0))[:, :length] * kernel[:, lag]
            for lag in range(1, kernel.shape[1])
        ),
        start=x * kernel[:, 0],
    )


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return torch.relu(x).square()


_PLAIN = {fast.squared_relu: squared_relu}
"""Plain functions shown in place of ones that only are faster."""


def _is_torchs(function: Callable[..., Tensor]) -> bool:
    return not function.__module__.startswith("memshard")


def _names(program: Program) -> dict[int, str]:
    return {0: "x", **{number: f"{node.op.lower()}_{number}" for number, node in program.values()}}


def _line(program: Program, number: int, node: Node, names: dict[int, str]) -> str:
    operation = OPERATIONS[node.op]
    module = "torch." if _is_torchs(operation.function) else ""
    arguments = [names[value] for value in node.inputs]
    arguments += [f"self.{names[number]}_weight"] if node.shape else []
    # repr: a float is read back with the same bits.
    arguments += [] if node.argument is None else [repr(node.argument)]
    arguments += [f"{key}={value!r}" for key, value in operation.options.items()]
    width = "length" if node.width is None else node.width
    shape = (
        f"[batch, {node.branches}, length, {width}]"
        if node.branches > 1
        else f"[batch, length, {width}]"
    )
    return (
        f"        {names[number]} = "
        f"{module}{operation.function.__name__}({', '.join(arguments)})  # {shape}"
    )


def _start(node: Node) -> str:
    kind, shape = OPERATIONS[node.op].parameter, ", ".join(map(str, node.shape))
    if kind == "vector":
        return f"torch.{'ones' if node.op == 'SCALE' else 'zeros'}({shape})"
    if kind == "matrix":
        return f"torch.randn({shape}) / {math.prod(node.shape[1:])} ** 0.5"
    size = OPERATIONS[node.op].kernel
    return (
        "torch.tensor([0.5, "
        f"{', '.join([repr(0.5 / size)] * (size - 1))}]).repeat({node.shape[0] // size})"
    )
