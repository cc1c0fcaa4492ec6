"""Golden DNAs, compiled, are the models written by hand: outputs, gradients,
numbers of parameters.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memshard.models.config import FeedForwardConfig, MixerConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.layers.norm import PrimerNorm
from memshard.models.loss import token_losses
from memshard.models.program.mixer import ProgramMixer
from memshard.models.program.program import Program
from memshard.models.transformer import Transformer
from memshard.search.dna.compile import Logits
from memshard.search.dna.fuse import fuse
from memshard.search.dna.golden import golden
from memshard.search.dna.graph import graph
from memshard.search.dna.shapes import lower
from tests.search.programs import HEAD_WIDTH, SHAPE, changed, compiled, line

HEADS = 8
NORM = 5
"""Number of the golden subprogram."""
HAND: dict[str, dict[str, Any]] = {
    "transformer": {"feedforward": FeedForwardConfig(activation="relu")},
    "transformer-pp": {
        "feedforward": FeedForwardConfig(activation="swiglu", hidden=24 * HEAD_WIDTH),
        "norm": "rms",
    },
    "primer-ez": {
        "mixer": MixerConfig(heads=HEADS, convolution=3),
        "feedforward": FeedForwardConfig(activation="squared_relu"),
    },
    # Primer's norm is LayerNorm by another formula; here with the same epsilon.
    "primer": {
        "mixer": MixerConfig(heads=HEADS, convolution=3, share_qk=True),
        "feedforward": FeedForwardConfig(activation="squared_relu", norm="after"),
    },
}


def _by_hand(name: str) -> Transformer:
    settings = {"mixer": MixerConfig(heads=HEADS), "position": "sinusoidal", **HAND[name]}
    model = Transformer(
        ModelConfig(vocab_size=SHAPE.vocab, layers=SHAPE.layers, dim=HEADS * HEAD_WIDTH, **settings)
    )
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = 1e-5  # as programs have it; RMSNorm here has 1e-6
    if isinstance(model.norm, nn.RMSNorm):
        model.norm = nn.LayerNorm(
            HEADS * HEAD_WIDTH
        )  # A search gives all candidates the same last norm.
    return model.double()


def _names(name: str, program: Program) -> list[str]:
    """Return the parameters of a block written by hand, in the order in which the
    program uses them.
    """
    convolved = [f"mixer.{kind}" for kind in ("query", "key", "value")]
    before, after = _norm(name, "mixer"), _norm(name, "feedforward")
    if name == "primer":
        filters = {kind: f"mixer.convolutions.{kind}.weight" for kind in ("key", "value")}
        mixing = [
            "mixer.key.weight",
            filters["key"],
            "mixer.query.weight",
            "mixer.value.weight",
            filters["value"],
        ]
        return [
            *before,
            *mixing,
            "mixer.output.weight",
            "feedforward.up.weight",
            "feedforward.down.weight",
            *after,
        ]
    mixing = [f"{kind}.weight" for kind in convolved]
    if name == "primer-ez":
        mixing = [
            weight
            for kind in convolved
            for weight in (
                f"{kind}.weight",
                f"{kind.replace('mixer', 'mixer.convolutions')}.weight",
            )
        ]
    widening = ["feedforward.up.weight"]
    if name == "transformer-pp":
        # Products have no order of their own: what a sigmoid reads is the gate.
        maps = [number for number, node in program.values() if node.op == "CONV_1X1"][-3:-1]
        gate = next(node.inputs[0] for node in program.nodes if node.op == "SIGMOID")
        widening = [f"feedforward.{'gate' if number == gate else 'up'}.weight" for number in maps]
    return [*before, *mixing, "mixer.output.weight", *after, *widening, "feedforward.down.weight"]


def _norm(name: str, which: str) -> list[str]:
    return [
        f"{which}_residual.norm.{kind}"
        for kind in (("weight",) if name == "transformer-pp" else ("weight", "bias"))
    ]


def _own_head(name: str, parameter: str, theirs: Tensor) -> Tensor:
    """Return the part of a parameter written by hand that a program has. Its branches do not see
    each other: Primer's map from keys to queries, which goes over all heads at once, is one for
    each head there.
    """
    if name == "primer" and parameter == "mixer.query.weight":
        return (
            theirs.view(HEADS, HEAD_WIDTH, HEADS, HEAD_WIDTH)
            .diagonal(dim1=0, dim2=2)
            .permute(2, 0, 1)
            .reshape(-1, HEAD_WIDTH)
        )
    return theirs


@pytest.mark.parametrize("name", HAND)
def test_golden_programs_are_the_models_written_by_hand(name: str) -> None:
    program = compiled(golden(name, HEAD_WIDTH))
    logits, hand = program.build(0), _by_hand(name)
    assert isinstance(logits, Logits)
    mine = logits.model.double()
    across_heads = SHAPE.layers * (HEADS * HEADS - HEADS) * HEAD_WIDTH**2 if name == "primer" else 0
    assert (
        program.parameters
        == sum(parameter.numel() for parameter in hand.parameters()) - across_heads
    )

    torch.manual_seed(0)
    pairs = [
        (mine.embedding.weight, "embedding.weight"),
        (mine.norm.weight, "norm.weight"),
        (mine.norm.bias, "norm.bias"),
    ]
    for layer, block in enumerate(mine.blocks):
        assert isinstance(block.mixer, ProgramMixer)
        parameters = sorted(
            block.mixer.named_parameters(), key=lambda entry: int(entry[0].split(".")[1])
        )
        names = _names(name, block.mixer.program)
        pairs += [
            (weight, f"blocks.{layer}.{theirs}")
            for (_, weight), theirs in zip(parameters, names, strict=True)
        ]
    assert len(pairs) == len(list(hand.parameters()))
    with torch.no_grad():
        for weight, theirs in pairs:
            drawn = (
                hand.get_parameter(theirs)
                .normal_(std=0.3)
                .add_(1.0 if theirs.endswith("norm.weight") else 0.0)
            )
            if name == "primer" and theirs.endswith("query.weight"):
                drawn.view(HEADS, HEAD_WIDTH, HEADS, HEAD_WIDTH).mul_(
                    torch.eye(HEADS)[:, None, :, None]
                )
            weight.copy_(_own_head(name, theirs.partition(".")[2].partition(".")[2], drawn))

    tokens = torch.randint(SHAPE.vocab, (3, 12))
    outputs = mine(tokens)[0], hand(tokens)[0]
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    for output in outputs:
        token_losses(output, tokens.roll(-1, 1)).sum().backward()
    for weight, theirs in pairs:
        gradient = hand.get_parameter(theirs).grad
        assert gradient is not None
        expected = _own_head(name, theirs.partition(".")[2].partition(".")[2], gradient)
        torch.testing.assert_close(
            weight.grad,
            expected,
            rtol=1e-9,
            atol=1e-11,
            msg=lambda text, theirs=theirs: f"{theirs}: {text}",
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "norm"), [("transformer", nn.LayerNorm), ("primer", PrimerNorm)])
def test_norms_in_half_precision_are_computed_in_fp32(
    name: str, norm: type[nn.Module], dtype: torch.dtype
) -> None:
    """Some channels are far from 0, whose mean half precision rounds, and some are large, whose
    squares fp16 does not hold.
    """
    mixer = ProgramMixer(
        fuse(lower(graph(changed(name, 0, [line({"sub": NORM}, 0)])), HEAD_WIDTH))
    ).to(dtype)
    torch.manual_seed(0)
    for spread in (1.0, 100.0):
        x = (100 + spread * torch.randn(2, 3, HEADS * HEAD_WIDTH)).to(dtype)
        y = mixer(x, Context.of(x[..., 0]))[0]
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.float(), norm(HEADS * HEAD_WIDTH)(x.float()), rtol=1e-2, atol=1e-3
        )


@pytest.mark.parametrize("name", HAND)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_programs_run_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """They are halved as a whole, as when they generate, and run under autocast."""
    program = compiled(golden(name, HEAD_WIDTH))
    block = program.build(0).get_submodule("model.blocks.0.mixer")
    x = torch.randn(2, 9, program.config.dim, generator=torch.Generator().manual_seed(0))
    ctx = Context.of(x[..., 0])
    with torch.no_grad():
        expected = block(x, ctx)[0]
        with torch.autocast("cpu", dtype):
            mixed = block(x, ctx)[0]
        halved = block.to(dtype)(x.to(dtype), ctx)[0]
        assert isinstance(block, ProgramMixer)
        pieces, state = [], block.init_state(2, 9)
        for piece in x.to(dtype).split([4, 5], 1):
            y, state = block(piece, Context.of(piece[..., 0]), state)
            pieces.append(y)
    for y in (mixed, halved, torch.cat(pieces, 1)):
        torch.testing.assert_close(
            y.float(), expected, rtol=0, atol=0.02 * float(expected.abs().max())
        )
