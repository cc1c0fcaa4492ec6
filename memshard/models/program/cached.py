"""Programs that continue a text: nodes that look back keep the rows they have seen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memshard.models.program.program import OPERATIONS, Node, Program

_SCORES = ("T_MAT_MUL", "MAT_MUL", "CUM_SUM", "CUM_PROD")


def refusal(program: Program) -> str | None:
    """Return why a program has no cached form, or None if it has one. It has none where rows of
    scores, which change or grow later, would have to be kept.
    """
    for number, node in program.values():
        if node.op in _SCORES and program.value(node.inputs[-1])[0] is None:
            return (
                f"value {number}, {node.op}, looks back at rows of scores, which grow with the text"
            )
    return None


def new_buffers(node: Node, inputs: Sequence[Tensor], capacity: int) -> tuple[Tensor, ...]:
    """Return buffers for `capacity` rows of each input that a node looks back at, [batch,
    (branches,) capacity, width], in the inputs' dtype and device.
    """
    if node.op == "ATTEND":
        kept = inputs[1:]
    elif node.op in _SCORES or OPERATIONS[node.op].kernel > 1:
        kept = inputs[-1:]
    else:
        return ()
    return tuple(x.new_zeros(*x.shape[:-2], capacity, x.shape[-1]) for x in kept)


def call_cached(
    node: Node,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    length: int,
) -> Tensor:
    """Return a node's rows for new tokens. kept: buffers with `length` rows of earlier tokens, to
    which the new ones are added in place.
    """
    new = inputs[0].shape[-2]
    operation = OPERATIONS[node.op]
    for buffer, rows in zip(kept, inputs[-len(kept) :] if kept else (), strict=True):
        buffer[..., length : length + new, :] = rows
    seen = [buffer[..., : length + new, :] for buffer in kept]
    extra = [] if node.argument is None else [node.argument]
    if node.op == "MASK":
        # Row i of the new tokens is row length + i of the text.
        return torch.tril(inputs[0], diagonal=length)
    if node.op in ("CUM_SUM", "CUM_PROD"):
        return operation.function(seen[0], **operation.options)[..., length:, :]
    if node.op == "ATTEND":
        scores = torch.einsum("...qd,...kd->...qk", inputs[0], seen[0]) * extra[0]
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(
            length + 1
        )
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ seen[1]
    if operation.kernel > 1:
        # A filter of width k looks back k - 1 rows before the first new one.
        recent = seen[0][..., max(0, length + 1 - operation.kernel) :, :]
        return operation.function(recent, *weights, *extra)[..., recent.shape[-2] - new :, :]
    if node.op in ("T_MAT_MUL", "MAT_MUL"):
        return operation.function(inputs[0], seen[0])
    return operation.function(*inputs, *weights, *extra, **operation.options)
