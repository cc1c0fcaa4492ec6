"""A compiled program: a list of torch calls with every width decided, as plain JSON."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from memshard.models.program.primitives import GLUE, PRIMITIVES, Primitive

OPERATIONS: dict[str, Primitive] = {**PRIMITIVES, **GLUE}


@dataclass(frozen=True)
class Node:
    """One call. Value 0 is the block's input, and value k + 1 the result of node k.

    width: channels of the result; None for scores, whose width is the length. branches: 1 for a
    value [batch, length, width], more for [batch, branches, length, width]. argument: constant,
    width, number of branches or of positions, which the function takes after its values and its
    parameter. shape: of the parameter; empty without one.
    """

    op: str
    inputs: tuple[int, ...]
    width: int | None
    branches: int = 1
    argument: float | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """A block's computation. width: of its input and output. The last node makes the output."""

    width: int
    nodes: tuple[Node, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(node.shape) for node in self.nodes if node.shape)

    def values(self) -> Iterator[tuple[int, Node]]:
        """Yield the number of each node's value, and the node."""
        return enumerate(self.nodes, start=1)

    def value(self, number: int) -> tuple[int | None, int]:
        """Return width and branches of a value."""
        return (
            (self.width, 1)
            if number == 0
            else (self.nodes[number - 1].width, self.nodes[number - 1].branches)
        )

    def to_json(self) -> str:
        """Return text that `from_json` reads."""
        return json.dumps({"width": self.width, "nodes": [asdict(node) for node in self.nodes]})

    @staticmethod
    def from_json(text: str) -> "Program":
        """Read a program. ValueError if the text is not one."""
        try:
            entries = json.loads(text)
            nodes = tuple(
                Node(
                    op=str(entry["op"]),
                    inputs=tuple(map(int, entry["inputs"])),
                    width=None if entry["width"] is None else int(entry["width"]),
                    branches=int(entry["branches"]),
                    argument=entry["argument"],
                    shape=tuple(map(int, entry["shape"])),
                )
                for entry in entries["nodes"]
            )
            program = Program(int(entries["width"]), nodes)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"model.program: not a compiled program ({error!r}): write one with `memshard "
                "search compile`"
            ) from None
        # A program comes with a checkpoint or an export, so it is checked as data from elsewhere:
        # only known operations, and only values that are already computed.
        for number, node in program.values():
            operation = OPERATIONS.get(node.op)
            if (
                operation is None
                or len(node.inputs) != operation.inputs
                or not all(0 <= value < number for value in node.inputs)
            ):
                raise ValueError(
                    f"model.program: node {number} ({node.op} of {list(node.inputs)}) is no call "
                    "of an earlier value"
                )
            # Maps and convolutions take the number of branches, depthwise filters their size.
            if bool(
                operation.takes or operation.parameter in ("matrix", "depthwise")
            ) != isinstance(node.argument, int | float):
                raise ValueError(
                    f"model.program: node {number} ({node.op}) has the argument {node.argument!r}"
                )
            if bool(operation.parameter) != bool(node.shape):
                raise ValueError(
                    f"model.program: node {number} ({node.op}) has a parameter of shape "
                    f"{list(node.shape)}"
                )
        return program
