"""Compile a DNA to the block of a model of a given width, checking it again at that width."""

from dataclasses import dataclass
from pathlib import Path

import torch

from memshard.models.context import Context
from memshard.models.program.cached import refusal
from memshard.models.program.mixer import ProgramMixer
from memshard.models.program.program import Program
from memshard.search.dna.causality import explained, perturbed
from memshard.search.dna.form import load
from memshard.search.dna.fuse import fuse
from memshard.search.dna.golden import NAMES, golden
from memshard.search.dna.graph import TooLong, graph
from memshard.search.dna.shapes import WrongShape, lower
from memshard.search.dna.source import source

_HEADS = 8  # heads of golden programs
# Single tokens and several at once, both into an empty cache and into a filled one.
_SEGMENTS = [1, 4, 1, 1, 2]
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class BlockAtWidth:
    """A block of a given width.

    program: text for `model.program`. source: torch code. parameters: number of its parameters.
    uncached: why it cannot generate, None if it can.
    """

    program: str
    source: str
    parameters: int
    uncached: str | None


def at_width(path: Path | str, dim: int) -> BlockAtWidth:
    """Compile the DNA of a file, or a golden one by its name, to a stream of `dim` channels.

    ValueError, with the file and the reason, where that is impossible, and where a program of this
    width sees later tokens, depends on the length of its text, or computes something else with a
    cache than without.
    """
    # A golden DNA holds the scale of its attention scores, the inverse root of a head's width; one
    # of a file keeps the constants that it was trained with. At least 1, so that a width below 8
    # meets the error below.
    dna = golden(str(path), max(1, dim // _HEADS)) if path in NAMES else load(path)
    stream = dna["dims"][0]
    if dim < 1 or dim % stream:
        raise ValueError(
            f"{path}: its stream is {stream} relative widths wide, which do not divide {dim}: "
            f"choose a multiple of {stream}"
        )
    try:
        whole = lower(graph(dna), dim // stream)
    except TooLong:
        raise ValueError(f"{path}: its calls, inlined, are more than a block may have") from None
    except WrongShape as wrong:
        raise ValueError(f"{path}: {wrong.reason} ({wrong.status})") from None
    program = fuse(whole)
    # The rules are those of primitives, so they judge the program before fusing; what runs is the
    # fused one, so that is perturbed.
    if rejected := explained(whole) or perturbed(program):
        raise ValueError(f"{path}: {rejected.reason} ({rejected.status})")
    uncached = refusal(program)
    if uncached is None and (worst := _decoding_error(program)) > _TOLERANCE:
        raise ValueError(
            f"{path}: decoding with a cache differs by {worst:.2g}: this is a fault of the cache, "
            "please report it"
        )
    return BlockAtWidth(program.to_json(), source(program), program.parameters, uncached)


@torch.no_grad()
def _decoding_error(program: Program) -> float:
    """Return the largest difference between reading a text at once and in segments with a cache, in
    fp64, relative to the largest output if that is above 1.
    """
    # fp64, so that a real difference is far above rounding: 1e-9 of the output's size.
    mixer = ProgramMixer(program).double()
    x = torch.randn(
        1,
        sum(_SEGMENTS),
        program.width,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    whole, _ = mixer(x, Context.of(x[..., 0]))
    state, parts = mixer.init_state(1, x.shape[1]), []
    for segment in x.split(_SEGMENTS, dim=1):
        part, state = mixer(segment, Context.of(segment[..., 0]), state)
        parts.append(part)
    return float((torch.cat(parts, dim=1) - whole).abs().max() / whole.abs().max().clamp(min=1))
