"""A whole block given by a compiled program, in the form of a mixer."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from memshard.models.context import Context
from memshard.models.mixers.mixer import Mixer
from memshard.models.program.cached import call_cached, new_buffers, refusal
from memshard.models.program.primitives import cast
from memshard.models.program.program import OPERATIONS, Node, Program


@dataclass(frozen=True)
class ProgramState:
    """The state of a program: for every node that looks back, `length` rows of buffers [batch,
    (branches,) capacity, width].

    rows: by the number of the node's value; empty before the first tokens, which determine batch,
    dtype and device.
    """

    capacity: int
    rows: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    length: int = 0


class ProgramMixer(Mixer):
    """Runs a program. Its parameters are named by the number of their node's value: `values.12`."""

    one_graph = False  # looks at the numbers of padding

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.values = nn.ParameterDict(
            {
                str(number): torch.empty(node.shape)
                for number, node in program.values()
                if node.shape
            }
        )
        last: dict[int, int] = {}
        for number, node in program.values():
            last.update(dict.fromkeys(node.inputs, number))
        # Each value is dropped after the last node that reads it, as in a function with local
        # variables; a list of all of them would keep the activations of some 40 nodes.
        self._free = {
            number: [value for value in set(node.inputs) if last[value] == number]
            for number, node in program.values()
        }
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scales to 1 and shifts to 0, draw matrices from N(0, 1 / inputs), and set depthwise
        filters as Primer does: 1/2 for the newest position.
        """
        for number, node in self.program.values():
            if node.shape:
                _draw(self.values[str(number)], node)

    def forward(
        self, x: Tensor, ctx: Context, state: ProgramState | None = None
    ) -> tuple[Tensor, ProgramState | None]:
        """Return [batch, length, width] and the advanced state.

        ValueError for documents, for padding before real tokens (after them it changes nothing),
        and for a full state.
        """
        if ctx.documents is not None:
            raise ValueError(
                "model.program is made of primitives and sees all earlier tokens: set "
                "data.document_mask=false"
            )
        # Padding after all real tokens changes nothing, unless a state would put
        # it before later ones.
        if ctx.padding is not None and bool(
            (~ctx.padding if state else ctx.padding[:, 1:] & ~ctx.padding[:, :-1]).any()
        ):
            raise ValueError(
                "model.program is made of primitives and sees all earlier tokens: give prompts of "
                "one length, or one by one"
            )
        if state is not None and state.length + x.shape[1] > state.capacity:
            needed = state.length + x.shape[1]
            raise ValueError(
                f"the program's state holds {state.capacity} tokens and {needed} are needed: give "
                "a larger capacity"
            )
        made, rows = {0: x}, dict(state.rows) if state else {}
        for number, node in self.program.values():
            inputs = cast(node.op, [made[value] for value in node.inputs], x.dtype)
            weights = [self.values[str(number)]] if node.shape else []
            if state is None:
                operation = OPERATIONS[node.op]
                extra = [] if node.argument is None else [node.argument]
                made[number] = operation.function(*inputs, *weights, *extra, **operation.options)
            else:
                if number not in rows:
                    rows[number] = new_buffers(node, inputs, state.capacity)
                made[number] = call_cached(node, inputs, weights, rows[number], state.length)
            for value in self._free[number]:
                del made[value]
        y = made[len(self.program.nodes)].to(x.dtype)
        return y, None if state is None else replace(
            state, rows=rows, length=state.length + x.shape[1]
        )

    def init_state(self, batch: int, capacity: int) -> ProgramState:
        """Return an empty state for `batch` rows of at most `capacity` tokens. ValueError, with the
        reason, for programs without a cached form.
        """
        if reason := refusal(self.program):
            raise ValueError(f"model.program cannot generate with a cache: {reason}")
        return ProgramState(capacity)

    @staticmethod
    def reorder(state: ProgramState, rows: Tensor) -> ProgramState:
        """Return the state whose row i is row rows[i] of this one. rows: [new batch] int64."""
        return replace(
            state,
            rows={
                number: tuple(kept[rows] for kept in buffers)
                for number, buffers in state.rows.items()
            },
        )

    @staticmethod
    def rollback(state: ProgramState, tokens: int) -> ProgramState:
        """Return the state before its last `tokens` tokens."""
        return replace(state, length=state.length - tokens)

    @staticmethod
    def reset(state: ProgramState, rows: Tensor) -> ProgramState:
        """Raise ValueError: rows share one length, and a program cannot forget part of one row."""
        raise ValueError(
            "model.program cannot forget single rows: carry no state over the ends of documents"
        )


def _draw(weight: Tensor, node: Node) -> None:
    kind = OPERATIONS[node.op].parameter
    with torch.no_grad():
        if kind == "vector":
            weight.fill_(1.0 if node.op == "SCALE" else 0.0)
        elif kind == "matrix":
            weight.normal_(std=weight[0].numel() ** -0.5)
        else:
            size = OPERATIONS[node.op].kernel
            weight.fill_(0.5 / size)
            weight[::size] = 0.5
