"""Check that a program does not see the future: by rules that explain a leak, and by a perturbation
test that needs no rules.
"""

from enum import Enum

import torch

from memshard.models.context import Context
from memshard.models.program.mixer import ProgramMixer
from memshard.models.program.program import Node, Program
from memshard.search.dna.rejected import Rejected

LENGTH = 9
_CUTS = (0, 3, LENGTH - 2)
_PREFIX = 4
_TOLERANCE = 1e-9


class Scores(Enum):
    """The content above the diagonal of scores, where a row would see later positions."""

    FUTURE = "what depends on later positions"
    FILLED = "numbers that do not depend on later positions"
    ZERO = "zeros"


def explained(program: Program) -> Rejected | None:
    """Return the first call that lets a position depend on later ones, or on the length of the
    text.

    None proves that there is none.
    """
    scores: dict[int, Scores] = {}
    for number, node in program.values():
        kinds = [scores.get(value) for value in node.inputs]
        if problem := _problem(node, kinds):
            status, reason = problem
            return Rejected(status, f"value {number}: {node.op} {reason}")
        if node.width is None:
            scores[number] = _above(node, kinds)
    return None


def _problem(node: Node, kinds: list[Scores | None]) -> tuple[str, str] | None:
    first = kinds[0]
    # Reductions over a row of scores see all of it, the part above the diagonal as well.
    if node.op.startswith("RED_"):
        if first is Scores.FUTURE:
            return "leak", "over scores of later positions, which no MASK has hidden"
        if first is Scores.FILLED:
            return (
                "length",
                "over scores that were made nonzero after MASK: it counts later positions",
            )
        if first is Scores.ZERO and node.op != "RED_SUM":
            return "length", "over masked scores counts the zeros of later positions"
    # Scores times values weigh every position, later ones by what is above the diagonal.
    if node.op == "MAT_MUL" and first is not Scores.ZERO:
        weights = (
            "scores that no MASK has hidden"
            if first is Scores.FUTURE
            else "what replaced masked zeros"
        )
        return "leak", f"weighs later positions with {weights}"
    if node.op == "T_MAT_MUL":
        if Scores.FUTURE in kinds:
            return "leak", "adds up scores of later positions, which no MASK has hidden"
        if kinds == [Scores.FILLED, Scores.FILLED]:
            return (
                "length",
                "adds up scores that were made nonzero after MASK: it counts later positions",
            )
    return None


def _above(node: Node, kinds: list[Scores | None]) -> Scores:
    """Return what a call that makes scores leaves above the diagonal."""
    first, second = kinds[0], kinds[-1]
    if node.op == "MASK":
        return Scores.ZERO
    if node.op == "T_MAT_MUL":
        return Scores.FUTURE
    if node.op == "MAT_MUL":
        return second or Scores.FUTURE
    if (node.op == "MULTIPLY" and Scores.ZERO in kinds) or (
        node.op == "DIVIDE" and first is Scores.ZERO
    ):
        return Scores.ZERO
    if Scores.FUTURE in kinds:
        return Scores.FUTURE
    if all(kind is Scores.ZERO for kind in kinds) and _keeps_zero(node):
        return Scores.ZERO
    return Scores.FILLED


def _keeps_zero(node: Node) -> bool:
    if node.op in ("MAX", "MIN"):
        bound = float(node.argument or 0)
        return bound <= 0 if node.op == "MAX" else bound >= 0
    plain = (
        "ADD",
        "DIFFERENCE",
        "SQUARE",
        "ABS",
        "SIGN",
        "SIN",
        "TANH",
        "C_MUL",
        "RECIP",
        "CUM_SUM",
        "CUM_PROD",
        "LIFT",
    )
    return node.op in plain


def perturbed(program: Program, seed: int = 0) -> Rejected | None:
    """Run the program on changed futures and on the beginning of a text, in fp64 with random
    parameters, and return what is wrong.

    None where outputs are finite, agree up to the first change to 1e-9 of their size, and those of
    4 positions are the first 4 of 9. Looking at gradients instead would miss leaks: the sign of an
    unmasked score leaks with gradient 0.
    """
    random = torch.Generator().manual_seed(seed)
    # fp64: in fp32 rounding would hide leaks of 1e-7.
    mixer = ProgramMixer(program).double()
    with torch.no_grad():
        for weight in mixer.parameters():
            # Random: a weight that starts at 0 would hide a leak behind it.
            deviation = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.5
            weight.copy_(
                torch.randn(weight.shape, generator=random, dtype=weight.dtype) * deviation
                + (1.0 if weight.ndim == 1 else 0.0)
            )
        x = torch.randn(1, LENGTH, program.width, generator=random, dtype=torch.float64)
        texts = x.repeat(1 + len(_CUTS), 1, 1)
        # One batch: the text, and copies that differ after position 0, 3 and 7.
        for row, cut in enumerate(_CUTS, start=1):
            texts[row, cut + 1 :] = torch.randn(
                LENGTH - cut - 1, program.width, generator=random, dtype=x.dtype
            )
        outputs = _run(mixer, texts)
        short = _run(mixer, x[:, :_PREFIX])
    if not (bool(outputs.isfinite().all()) and bool(short.isfinite().all())):
        return Rejected("nonfinite", f"outputs are not finite on random text of {LENGTH} positions")
    close = _TOLERANCE * max(1.0, float(outputs[0].abs().max()))
    for row, cut in enumerate(_CUTS, start=1):
        worst = float((outputs[row, : cut + 1] - outputs[0, : cut + 1]).abs().max())
        if worst > close:
            return Rejected(
                "leak", f"outputs up to position {cut} change by {worst:.2g} when later inputs do"
            )
    worst = float((short[0] - outputs[0, :_PREFIX]).abs().max())
    if worst > close:
        return Rejected(
            "length",
            f"the first {_PREFIX} outputs change by {worst:.2g} when the text goes on to {LENGTH} "
            "positions",
        )
    return None


def _run(mixer: ProgramMixer, texts: torch.Tensor) -> torch.Tensor:
    y, _ = mixer(texts, Context.of(texts[..., 0]))
    return y
