"""The mutations of Primer's search: each changes one thing in a way that affects the graph."""

import copy
import random
from collections.abc import Callable, Mapping

from memshard.models.program.primitives import PRIMITIVES
from memshard.search.dna.form import (
    BRANCHES,
    CONSTANTS,
    DIMS,
    LONGEST_SUBPROGRAM,
    OPERATIONS,
    RELATIVE_DIMS,
    Dna,
    Instruction,
)
from memshard.search.dna.graph import TooLong, graph

_TRIES = 50


def mutate(
    dna: Dna, random: random.Random, weights: Mapping[str, float] | None = None
) -> tuple[Dna, str]:
    """Return a child of a valid DNA, and the name of its mutation: delete, insert, replace, field,
    swap or bank.

    It tries again, up to 50 times, while the child computes the same as its parent. weights:
    weights of the mutations, by name; equal by default, as in AutoML-Zero (the paper gives none).
    The child is valid in form; whether it is a candidate is decided by compiling it.
    """
    weights = weights or dict.fromkeys(MUTATIONS, 1.0)
    if unknown := weights.keys() - MUTATIONS:
        raise ValueError(
            f"no mutation is called {', '.join(sorted(unknown))}; there are {', '.join(MUTATIONS)}"
        )
    parent = graph(dna).hash
    for _ in range(_TRIES):
        name = random.choices(list(weights), list(weights.values()))[0]
        child = copy.deepcopy(dna)
        # Without this most mutations hit dead code and a training would be spent on
        # the parent again.
        if MUTATIONS[name](child, random) and _hash(child) != parent:
            return child, name
    return child, name


def _hash(dna: Dna) -> str | None:
    try:
        return graph(dna).hash
    except TooLong:
        return None


def _delete(dna: Dna, random: random.Random) -> bool:
    """Remove an instruction; those that read its state read one of its inputs instead."""
    lines = random.choice(dna["subprograms"])
    if len(lines) == 1:
        return False
    place = random.randrange(len(lines))
    taken = lines.pop(place)
    # Readers fall back on an input, so that deleting an instruction keeps the path it was on.
    instead = random.choice(taken["in"][: _inputs(taken)])
    for line in lines[place:]:
        line["in"] = [
            instead if state == place + 2 else state - (state > place + 2) for state in line["in"]
        ]
    return True


def _insert(dna: Dna, random: random.Random) -> bool:
    """Insert a random instruction. Unless it comes last, a later one is made to read it half of the
    time: it would mostly be dead code otherwise.
    """
    number = random.randrange(len(dna["subprograms"]))
    lines = dna["subprograms"][number]
    if len(lines) == LONGEST_SUBPROGRAM:
        return False
    place = random.randrange(len(lines) + 1)
    for line in lines[place:]:
        line["in"] = [state + (state >= place + 2) for state in line["in"]]
    lines.insert(place, _random_instruction(number, place, len(dna["subprograms"]), random))
    later = lines[place + 1 :]
    if later and random.random() < 0.5:
        reader = random.choice(later)
        reader["in"][random.randrange(_inputs(reader))] = place + 2
    return True


def _replace(dna: Dna, random: random.Random) -> bool:
    """Delete, then insert."""
    return _delete(dna, random) and _insert(dna, random)


def _field(dna: Dna, random: random.Random) -> bool:
    """Replace one field of an instruction by a random one."""
    number = random.randrange(len(dna["subprograms"]))
    lines = dna["subprograms"][number]
    place = random.randrange(len(lines))
    fresh = _random_instruction(number, place, len(dna["subprograms"]), random)
    field = random.choice(("op", "first", "second", "const", "dim", "branch"))
    # Inputs are one list in the DNA and two fields in the paper, each as likely as the others.
    if field in ("first", "second"):
        side = int(field == "second")
        lines[place]["in"][side] = fresh["in"][side]
    else:
        lines[place][field] = fresh[field]
    return True


def _swap(dna: Dna, random: random.Random) -> bool:
    """Swap what two instructions of a subprogram do, and leave their inputs where they are."""
    lines = random.choice(dna["subprograms"])
    if len(lines) == 1:
        return False
    first, second = random.sample(lines, 2)
    for field in ("op", "const", "dim", "branch"):
        first[field], second[field] = second[field], first[field]
    return True


def _bank(dna: Dna, random: random.Random) -> bool:
    """Change a shared value: a constant c to c 10^X + Y with X, Y ~ N(0, 1), or a width to another
    of the vocabulary.
    """
    place = random.randrange(CONSTANTS + DIMS)
    if place < CONSTANTS:
        # The factor changes the size of a constant, the addend lets it leave 0 and change its sign.
        constant = dna["constants"][place] * 10 ** random.gauss(0, 1) + random.gauss(0, 1)
        # Within fp32's range: an infinite constant would make every descendant NaN.
        dna["constants"][place] = max(-1e30, min(1e30, constant))
    else:
        here = dna["dims"][place - CONSTANTS]
        dna["dims"][place - CONSTANTS] = random.choice(
            [dim for dim in RELATIVE_DIMS if dim != here]
        )
    return True


def _random_instruction(
    number: int, place: int, subprograms: int, random: random.Random
) -> Instruction:
    """Return a random instruction for a place of a subprogram. Operations are equally likely, and
    one branch is as likely as several.
    """
    choice = random.randrange(len(OPERATIONS) + subprograms - number - 1)
    return {
        "op": OPERATIONS[choice]
        if choice < len(OPERATIONS)
        else {"sub": number + 1 + choice - len(OPERATIONS)},
        "in": [random.randrange(place + 2), random.randrange(place + 2)],
        "const": random.randrange(CONSTANTS),
        "dim": random.randrange(DIMS),
        "branch": 1 if random.random() < 0.5 else random.choice(BRANCHES[1:]),
    }


def _inputs(line: Instruction) -> int:
    return 2 if isinstance(line["op"], dict) else PRIMITIVES[line["op"]].inputs


MUTATIONS: dict[str, Callable[[Dna, random.Random], bool]] = {
    "delete": _delete,
    "insert": _insert,
    "replace": _replace,
    "field": _field,
    "swap": _swap,
    "bank": _bank,
}
