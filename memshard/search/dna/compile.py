"""Compile a DNA to a model, or to the reason why it cannot be one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from memshard.models.config import ModelConfig
from memshard.models.initialize import initialize
from memshard.models.loss import token_losses
from memshard.models.program.program import Program
from memshard.models.transformer import Transformer
from memshard.search.dna.causality import explained, perturbed
from memshard.search.dna.form import Dna, invalid
from memshard.search.dna.fuse import fuse
from memshard.search.dna.graph import Graph, TooLong, graph
from memshard.search.dna.rejected import Rejected
from memshard.search.dna.shapes import WrongShape, lower, unit_in_band
from memshard.search.dna.source import source

_TRIAL_UNIT, _TRIAL_LENGTH, _TRIAL_VOCABULARY, _TRIAL_STEPS = 2, 12, 17, 3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that all candidates of a search share.

    vocab: tokens of the vocabulary. length: tokens of a sequence. parameters: fewest and most
    parameters of a model, with its embedding (which is also its head). layers: how often the block
    is stacked. Positions enter as sinusoids.
    """

    vocab: int
    length: int
    parameters: tuple[int, int]
    layers: int = 6


@dataclass(frozen=True)
class Compiled:
    """A DNA that may be trained.

    hash: hash of its graph, equal for DNAs that compute the same. parameters: number of parameters
    of the model. source: the block as readable torch code. build: makes the model from a seed;
    it maps tokens int64 [batch, length] to logits [batch, length, vocabulary]. config: the same
    model in a recipe. unit: channels of relative width 1.
    """

    hash: str
    parameters: int
    source: str
    build: Callable[[int], nn.Module]
    config: ModelConfig
    unit: int


class Logits(nn.Module):
    """A decoder as a function of its tokens alone."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [batch, length, vocabulary]. tokens: [batch, length] int64."""
        logits: Tensor = self.model(tokens)[0]
        return logits


def compile_dna(dna: Dna, shape: Shape) -> Compiled | Rejected:
    """Return a DNA compiled, or why it is rejected; the cheapest checks come first.

    The unit is chosen that brings the model into the band of parameters.
    """
    if problem := invalid(dna):
        return Rejected("invalid", problem)
    try:
        # One form for equal computations: its hash shows duplicates before they cost a training.
        canonical = graph(dna)
        if not canonical.operations:
            return Rejected("invalid", "the block does nothing: its output is its input")
        # Before the unit is sought: a program without meaning costs no more than this.
        trial = lower(canonical, _TRIAL_UNIT)
        unit = unit_in_band(partial(_parameters, canonical, shape), shape.parameters)
        if unit is None:
            return Rejected(
                "band",
                f"no width has {shape.parameters[0]:,} to {shape.parameters[1]:,} parameters",
            )
        program = lower(canonical, unit)
    except TooLong:
        return Rejected("invalid", "its calls, inlined, are more than a block may have")
    except WrongShape as wrong:
        return Rejected(wrong.status, wrong.reason)
    fused, narrow = fuse(program), fuse(trial)
    config = ModelConfig(
        vocab_size=shape.vocab,
        layers=shape.layers,
        dim=program.width,
        position="sinusoidal",
        max_length=shape.length,
        program=fused.to_json(),
    )
    parameters = _count(program, shape)
    if not shape.parameters[0] <= parameters <= shape.parameters[1]:
        allowed = f"{shape.parameters[0]:,} to {shape.parameters[1]:,} are allowed"
        return Rejected("band", f"{parameters:,} parameters at the nearest width; {allowed}")
    # Checks run at 2 channels a unit: causality does not depend on width, and
    # they cost milliseconds.
    if rejected := explained(trial) or perturbed(narrow) or _diverges(narrow):
        return rejected
    return Compiled(
        canonical.hash, parameters, source(fused), partial(_build, config), config, unit
    )


def _parameters(canonical: Graph, shape: Shape, unit: int) -> int:
    return _count(lower(canonical, unit), shape)


def _count(program: Program, shape: Shape) -> int:
    # Embedding, blocks, and scale and shift of the last norm.
    return shape.vocab * program.width + shape.layers * program.parameters + 2 * program.width


def _build(config: ModelConfig, seed: int) -> nn.Module:
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    initialize(model, seed)
    return Logits(model)


def _diverges(program: Program) -> Rejected | None:
    """Take three steps of a narrow model: a program that cannot take them will not train."""
    config = ModelConfig(
        vocab_size=_TRIAL_VOCABULARY,
        layers=1,
        dim=program.width,
        position="none",
        program=program.to_json(),
    )
    model = _build(config, 0)
    tokens = torch.randint(
        _TRIAL_VOCABULARY, (2, _TRIAL_LENGTH + 1), generator=torch.Generator().manual_seed(0)
    )
    # Plain SGD: its steps grow with the gradient, so what diverges does so within a few.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(1, _TRIAL_STEPS + 1):
        optimizer.zero_grad()
        loss = token_losses(model(tokens[:, :-1]), tokens[:, 1:]).mean()
        loss.backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if not (
            bool(loss.isfinite()) and all(bool(gradient.isfinite().all()) for gradient in gradients)
        ):
            return Rejected(
                "nonfinite", f"loss or gradients are not finite in step {step} of a narrow model"
            )
        optimizer.step()
    return None
