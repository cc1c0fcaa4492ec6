"""Programs for tests."""

from typing import Any

from memshard.search.dna.compile import Compiled, Shape, compile_dna
from memshard.search.dna.form import Dna
from memshard.search.dna.golden import golden

HEAD_WIDTH = 8
SHAPE = Shape(vocab=29, length=24, parameters=(90_000, 130_000), layers=2)
"""In which golden programs have heads of 8 channels and a stream of 64."""


def line(op: Any, *states: int, **fields: Any) -> Dna:
    """Return an instruction."""
    return {"op": op, "in": [*states, 0, 0][:2], "const": 0, "dim": 0, "branch": 1, **fields}


def compiled(dna: Dna) -> Compiled:
    """Return a DNA compiled, which it must be."""
    program = compile_dna(dna, SHAPE)
    assert isinstance(program, Compiled), program
    return program


def changed(name: str, subprogram: int, lines: list[Dna]) -> Dna:
    """Return a golden DNA with other lines for one subprogram."""
    dna = golden(name, HEAD_WIDTH)
    dna["subprograms"][subprogram] = lines
    return dna


SOFTMAX = 4
"""Number of the golden subprogram."""
