"""The canonical graph of a DNA: calls inlined, dead code removed, one form for equal computations,
and its hash.
"""

import hashlib
import json
import math
from dataclasses import dataclass

from memshard.models.program.primitives import COMMUTATIVE, PRIMITIVES
from memshard.search.dna.form import Dna

MOST_NODES = 1024
_IDEMPOTENT = frozenset({"ABS", "SIGN", "MASK", "MAX", "MIN"})


@dataclass(frozen=True)
class Operation:
    """A primitive of a graph, or "JOIN" of the branches of a call.

    inputs: value 0 is the block's input, value k + 1 the result of operation k. argument: the
    constant of C_MUL, MAX and MIN, the relative width of convolutions, the number of branches of
    JOIN. branches: numbers of branches in which the enclosing calls run, outermost first; an
    operation without parameters whose inputs are in no branch is computed once for all.
    """

    op: str
    inputs: tuple[int, ...]
    argument: float | None
    branches: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Operations, each after its inputs and the output last. stream: relative width of the block's
    input and output.
    """

    stream: int
    operations: tuple[Operation, ...]
    digests: tuple[str, ...]
    """For each operation a hash of what it computes: equal for computations that differ at most in
    which parameters they use.
    """

    @property
    def hash(self) -> str:
        """A hash that is equal for DNAs that compute the same, however they are written."""
        entries = [
            [entry.op, entry.inputs, entry.argument, entry.branches] for entry in self.operations
        ]
        return _digest([self.stream, entries])


class TooLong(Exception):
    """Raised for a DNA that has more than MOST_NODES operations once its calls are inlined."""


def graph(dna: Dna) -> Graph:
    """Return the canonical graph of a valid DNA. TooLong where it is too large."""
    inliner = _Inliner(dna)
    output = inliner.call(0, (0, 0), ())
    return _ordered(dna["dims"][0], output, inliner.made)


class _Inliner:
    """Inlines calls, bottom up. A repeated computation without parameters is made once."""

    def __init__(self, dna: Dna) -> None:
        self.dna = dna
        self.made: list[Operation] = []
        self._known: dict[Operation, int] = {}
        self._calls = 0

    def call(self, subprogram: int, inputs: tuple[int, int], context: tuple[int, ...]) -> int:
        self._calls += 1
        if self._calls > MOST_NODES:
            raise TooLong
        lines = self.dna["subprograms"][subprogram]
        # Only what the output needs is inlined: a dead call would cost as much as a live one.
        needed = {len(lines) + 1}
        for place in reversed(range(len(lines))):
            if place + 2 in needed:
                op = lines[place]["op"]
                needed.update(
                    lines[place]["in"][: 2 if isinstance(op, dict) else PRIMITIVES[op].inputs]
                )
        states: list[int] = list(inputs)
        for place, line in enumerate(lines):
            if place + 2 not in needed:
                states.append(0)
                continue
            branch = line["branch"]
            inside = (*context, branch) if branch > 1 else context
            first, second = (states[state] for state in line["in"])
            if isinstance(line["op"], dict):
                state = self.call(line["op"]["sub"], (first, second), inside)
            else:
                state = self.primitive(line, (first, second), inside)
            if branch > 1:
                state = self.add(Operation("JOIN", (state,), branch, context))
            states.append(state)
        return states[-1]

    def primitive(self, line: Dna, states: tuple[int, int], context: tuple[int, ...]) -> int:
        op = line["op"]
        primitive = PRIMITIVES[op]
        argument = None
        if primitive.takes == "constant":
            argument = float(self.dna["constants"][line["const"]])
        elif primitive.takes == "width":
            argument = self.dna["dims"][line["dim"]]
        return self.add(Operation(op, states[: primitive.inputs], argument, context))

    def add(self, made: Operation) -> int:
        op, inputs = made.op, made.inputs
        source = self.made[inputs[0] - 1] if inputs[0] else None
        if op == "C_MUL" and made.argument == 1:
            return inputs[0]
        if source is not None and op == source.op:
            if op == "C_MUL" and math.isfinite(
                product := (made.argument or 0) * (source.argument or 0)
            ):
                return self.add(Operation(op, source.inputs, product, made.branches))
            if op in _IDEMPOTENT and made.argument == source.argument:
                return inputs[0]
        if op == "MULTIPLY" and inputs[0] == inputs[1]:
            return self.add(Operation("SQUARE", inputs[:1], None, made.branches))
        if op == "ADD" and inputs[0] == inputs[1]:
            return self.add(Operation("C_MUL", inputs[:1], 2.0, made.branches))
        # Two equal operations with parameters are two: they learn different values.
        learns = op != "JOIN" and PRIMITIVES[op].parameter
        if not learns:
            seen = max((self.branches(value) for value in inputs), key=len)
            # A branched call without parameters makes equal branches; JOIN then repeats one.
            depth = made.branches if op == "JOIN" else seen
            made = Operation(op, inputs, made.argument, depth if len(depth) <= len(seen) else seen)
            if made in self._known:
                return self._known[made]
        if len(self.made) == MOST_NODES:
            raise TooLong
        self.made.append(made)
        if not learns:
            self._known[made] = len(self.made)
        return len(self.made)

    def branches(self, value: int) -> tuple[int, ...]:
        return self.made[value - 1].branches if value else ()


def _ordered(stream: int, output: int, made: list[Operation]) -> Graph:
    """Return the operations that the output needs, in an order that does not depend on how the DNA
    is written.
    """
    digests = [""]
    for entry in made:
        below = [digests[value] for value in entry.inputs]
        digests.append(
            _digest(
                [
                    entry.op,
                    sorted(below) if entry.op in COMMUTATIVE else below,
                    entry.argument,
                    entry.branches,
                ]
            )
        )
    numbers = {0: 0}
    operations: list[Operation] = []
    kept: list[str] = []
    stack = [output]
    while stack:
        value = stack[-1]
        if value in numbers:
            stack.pop()
            continue
        entry = made[value - 1]
        inputs = (
            # a + b and b + a get one order, that of their digests.
            sorted(entry.inputs, key=lambda one: digests[one])
            if entry.op in COMMUTATIVE
            else list(entry.inputs)
        )
        # Depth first from the output, with a list as the stack: 1,024 calls would
        # exceed Python's limit.
        if waiting := [one for one in inputs if one not in numbers]:
            stack.append(waiting[0])
            continue
        stack.pop()
        operations.append(
            Operation(
                entry.op, tuple(numbers[one] for one in inputs), entry.argument, entry.branches
            )
        )
        kept.append(digests[value])
        numbers[value] = len(operations)
    return Graph(stream, tuple(operations), tuple(kept))


def _digest(entries: object) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:24]
