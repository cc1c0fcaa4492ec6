"""The DNA of a decoder block, as plain JSON (So et al. 2021, "Primer").

    {"version": 1,
     "subprograms": [[instruction, ...], ...],  subprogram 0 is the block; i may only call j > i
     "constants": [0.0, 0.125],                 bank of constants
     "dims": [8, 1, 32, 4, 16, 2]}              bank of relative widths; dims[0]: residual stream

    {"op": "CONV_1X1" or {"sub": 3}, "in": [0, 1], "const": 0, "dim": 2, "branch": 8}

A subprogram's inputs are its states 0 and 1, instruction k makes state k + 2, and the last state is
its output. An instruction refers to constants and widths by their place in a bank, so that many
instructions change together. Every instruction has all fields; those its operation does not use can
change without effect. `branch` runs the instruction that many times, with separate parameters, and
puts the results side by side.
"""

import json
from pathlib import Path
from typing import Any, cast

from memshard.io import parse_json, read_small
from memshard.models.program.primitives import PRIMITIVES

Dna = dict[str, Any]
Instruction = dict[str, Any]

VERSION = 1
RELATIVE_DIMS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
BRANCHES = (1, 2, 4, 8, 16)
CONSTANTS = 2
DIMS = 6
LONGEST_SUBPROGRAM = 64
OPERATIONS = tuple(PRIMITIVES)


def load(path: Path | str) -> Dna:
    """Read a DNA from a JSON file. ValueError if the file has none."""
    try:
        dna = parse_json(read_small(Path(path)))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if problem := invalid(dna):
        raise ValueError(f"{path}: not a DNA: {problem}")
    return cast(Dna, dna)


def save(dna: Dna, path: Path | str) -> None:
    """Write a DNA, one instruction a line."""
    subprograms = ",\n".join(
        f" [{body}]"
        for body in (",\n  ".join(map(json.dumps, lines)) for lines in dna["subprograms"])
    )
    banks = "".join(f',\n"{bank}": {json.dumps(dna[bank])}' for bank in ("constants", "dims"))
    Path(path).write_text(
        f'{{"version": {VERSION},\n"subprograms": [\n{subprograms}]{banks}}}\n', encoding="utf-8"
    )


def invalid(dna: Any) -> str | None:
    """Return what is wrong with the form of a DNA, or None."""
    if not isinstance(dna, dict) or set(dna) != {"version", "subprograms", "constants", "dims"}:
        return "expected an object with version, subprograms, constants and dims"
    if dna["version"] != VERSION:
        return f"version {dna['version']!r}; this program reads {VERSION}"
    # The bound is for infinities, which Python's JSON reads and writes.
    if not _numbers(dna["constants"], CONSTANTS) or any(
        abs(constant) > 1e30 for constant in dna["constants"]
    ):
        return f"constants are {dna['constants']!r}; expected {CONSTANTS} finite numbers"
    if not _numbers(dna["dims"], DIMS) or not set(dna["dims"]) <= set(RELATIVE_DIMS):
        return f"dims are {dna['dims']!r}; expected {DIMS} of {RELATIVE_DIMS}"
    subprograms = dna["subprograms"]
    if (
        not isinstance(subprograms, list)
        or not subprograms
        or not all(isinstance(lines, list) for lines in subprograms)
    ):
        return "subprograms is no list of lists of instructions"
    for number, lines in enumerate(subprograms):
        if not 0 < len(lines) <= LONGEST_SUBPROGRAM:
            return (
                f"subprogram {number} has {len(lines)} instructions; expected 1 to "
                f"{LONGEST_SUBPROGRAM}"
            )
        for place, instruction in enumerate(lines):
            if problem := _wrong(instruction, number, place, len(subprograms)):
                return f"subprogram {number}, instruction {place}: {problem}"
    return None


def _numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        # `type`, since true is an int to isinstance; NaN is not equal to itself.
        and all(type(value) in (int, float) and value == value for value in values)
    )


def _wrong(instruction: Any, number: int, place: int, subprograms: int) -> str | None:
    if not isinstance(instruction, dict) or set(instruction) != {
        "op",
        "in",
        "const",
        "dim",
        "branch",
    }:
        return "expected op, in, const, dim and branch"
    op = instruction["op"]
    if isinstance(op, dict):
        # Calls go to later subprograms only: no recursion, so inlining ends.
        if set(op) != {"sub"} or type(op["sub"]) is not int or not number < op["sub"] < subprograms:
            return f"calls {op!r}; it may call subprograms {number + 1} to {subprograms - 1}"
    elif op not in PRIMITIVES:
        return f"unknown operation {op!r}"
    inputs = instruction["in"]
    if (
        not isinstance(inputs, list)
        or len(inputs) != 2
        or not all(type(state) is int and 0 <= state < place + 2 for state in inputs)
    ):
        return f"inputs are {inputs!r}; expected two states below {place + 2}"
    for field, size in (("const", CONSTANTS), ("dim", DIMS)):
        if type(instruction[field]) is not int or not 0 <= instruction[field] < size:
            return f"{field} is {instruction[field]!r}; expected a bank's entry, 0 to {size - 1}"
    # The type as well, since True and 1.0 are in BRANCHES to Python.
    if instruction["branch"] not in BRANCHES or type(instruction["branch"]) is not int:
        return f"branch is {instruction['branch']!r}; expected one of {BRANCHES}"
    return None
