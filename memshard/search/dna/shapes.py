"""Widths of a graph: relative widths times a unit, the unit chosen for a band of parameters, and
operands made to fit where they differ.
"""

import math
from collections.abc import Callable, Sequence

from memshard.models.program.primitives import PRIMITIVES
from memshard.models.program.program import Node, Program
from memshard.search.dna.graph import Graph, Operation

_MOST_UNITS = 1 << 14
# Equally spaced, as second differences need it.
_SAMPLES = (8, 16, 24)


class WrongShape(Exception):
    """Raised for an operation that has no meaning for its operands. status: "shape", or "length"
    for one that would learn parameters of single positions.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def lower(graph: Graph, unit: int) -> Program:
    """Return the program with relative widths times `unit`. WrongShape where there is none."""
    maker = _Maker(graph.stream * unit, unit)
    for operation, digest in zip(graph.operations, graph.digests, strict=True):
        maker.made.append(maker.operation(operation, digest))
    output = maker.made[-1]
    width, branches = maker.shape(output)
    assert branches == 1
    if width is None:
        raise WrongShape("shape", "the output is scores, as wide as the text is long")
    if width != maker.stream:
        maker.fit(output, maker.stream)
    return Program(maker.stream, tuple(maker.nodes))


def unit_in_band(parameters: Callable[[int], int], band: tuple[int, int]) -> int | None:
    """Return a unit for which the number of parameters is in the band, or None.

    Of those that fit it is the roundest in binary, and of equally round ones the nearest to the
    middle.
    """
    # Every parameter is a vector or a matrix of widths that grow with the unit: a polynomial of
    # degree 2, whatever the program.
    first, second, third = (parameters(unit) for unit in _SAMPLES)
    step = _SAMPLES[1] - _SAMPLES[0]
    square = (third - 2 * second + first) / (2 * step * step)
    linear = (second - first) / step - square * (_SAMPLES[0] + _SAMPLES[1])
    constant = first - linear * _SAMPLES[0] - square * _SAMPLES[0] ** 2
    low, high = (_root(square, linear, constant - bound) for bound in band)
    if low is None or high is None:
        return None
    # 1e-6 of slack: a bound that a whole unit meets exactly comes out of the root with rounding.
    units = range(max(1, math.ceil(low - 1e-6)), min(_MOST_UNITS, math.floor(high + 1e-6)) + 1)
    # Parameters grow with the square of the unit, so the geometric mean is in the middle.
    middle = math.sqrt(max(low, 1) * max(high, 1))
    for multiple in (8, 4, 2, 1):
        if fitting := [unit for unit in units if unit % multiple == 0]:
            return min(fitting, key=lambda unit: abs(unit - middle))
    return None


def _root(square: float, linear: float, constant: float) -> float | None:
    # Without matrices the number of parameters grows linearly with the unit.
    if square < 1e-9:
        return -constant / linear if linear > 1e-9 else None
    inside = linear * linear - 4 * square * constant
    return None if inside < 0 else (math.sqrt(inside) - linear) / (2 * square)


class _Maker:
    """Turns operations into nodes, one after another. made: the program's value for each value of
    the graph.
    """

    def __init__(self, stream: int, unit: int) -> None:
        self.stream, self.unit = stream, unit
        self.nodes: list[Node] = []
        self.made = [0]

    def shape(self, value: int) -> tuple[int | None, int]:
        return (
            (self.stream, 1)
            if value == 0
            else (self.nodes[value - 1].width, self.nodes[value - 1].branches)
        )

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes)

    def fit(self, value: int, width: int) -> int:
        return self.add(Node("FIT", (value,), width, self.shape(value)[1], width))

    def lifted(self, value: int, branches: int) -> int:
        width, here = self.shape(value)
        return (
            value
            if here == branches
            else self.add(Node("LIFT", (value,), width, branches, branches // here))
        )

    def operation(self, entry: Operation, digest: str) -> int:
        inputs = [self.made[value] for value in entry.inputs]
        branches = math.prod(entry.branches)
        if entry.op == "JOIN":
            return self.join(inputs[0], int(entry.argument or 0), branches)
        primitive = PRIMITIVES[entry.op]
        if primitive.parameter:
            return self.learnt(entry, inputs[0], branches)
        if primitive.inputs == 2:
            inputs = self.agreed(entry.op, inputs, digest)
        inputs = [self.lifted(value, branches) for value in inputs]
        widths = [self.shape(value)[0] for value in inputs]
        width: int | None
        if entry.op.startswith("RED_"):
            width = 1
        elif entry.op == "MAT_MUL":
            width = widths[1]
        elif entry.op == "T_MAT_MUL":
            width = None
        elif len(widths) == 2 and widths[0] == 1:
            width = widths[1]
        else:
            width = widths[0]
        if entry.op == "MASK" and width is not None:
            raise WrongShape(
                "shape",
                f"MASK of a value {width} wide: it hides later positions in scores, as wide as "
                "the text is long",
            )
        return self.add(Node(entry.op, tuple(inputs), width, branches, entry.argument))

    def join(self, value: int, factor: int, branches: int) -> int:
        width, here = self.shape(value)
        if width is None:
            raise WrongShape(
                "shape",
                f"{factor} branches of scores have no place side by side: their width is the "
                "length",
            )
        if here == branches:
            return self.fit(value, width * factor)
        return self.add(Node("JOIN", (value,), width * factor, branches, factor))

    def learnt(self, entry: Operation, value: int, branches: int) -> int:
        primitive = PRIMITIVES[entry.op]
        width, here = self.shape(value)
        if width is None:
            raise WrongShape(
                "length",
                f"{entry.op} of scores would learn a number for each position, of one length of "
                "text alone",
            )
        if primitive.parameter == "matrix":
            # A value that all branches share is multiplied once, by the branches' matrices below
            # each other: one product, and no copy for each branch.
            if here > 1:
                value = self.lifted(value, branches)
            outputs = int(entry.argument or 0) * self.unit
            shape = (
                branches * outputs,
                width,
                *([primitive.kernel] if primitive.kernel > 1 else []),
            )
            return self.add(Node(entry.op, (value,), outputs, branches, branches, shape))
        value = self.lifted(value, branches)
        size = None if primitive.parameter == "vector" else primitive.kernel
        return self.add(
            Node(entry.op, (value,), width, branches, size, (branches * width * (size or 1),))
        )

    def agreed(self, op: str, inputs: Sequence[int], digest: str) -> list[int]:
        """Return the operands, one made as wide as the other where they differ. Which one is a hash
        of the graph, so that equal DNAs compile to equal programs.
        """
        first, second = (self.shape(value)[0] for value in inputs)
        if op == "MAT_MUL":
            if first is not None:
                raise WrongShape(
                    "shape",
                    "MAT_MUL needs scores on its left, as wide as the text is long, and has a "
                    f"value {first} wide",
                )
            return list(inputs)
        # A width of 1 is broadcast, except in q k^T, which sums over it.
        if first == second or (op != "T_MAT_MUL" and 1 in (first, second)):
            return list(inputs)
        if first is None or second is None:
            raise WrongShape(
                "shape",
                f"{op} of scores, as wide as the text is long, and of a value {first or second} "
                "wide",
            )
        # A coin that is the same for every way to write the DNA.
        chosen = int(digest, 16) % 2
        fitted = list(inputs)
        fitted[chosen] = self.fit(inputs[chosen], second if chosen == 0 else first)
        return fitted
