"""Feedforwards, memories and losses a piece of the sequence at a time give what they give at once,
without ever being whole.
"""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.models.config import FeedForwardConfig, MixerConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.kernels.plain_rows import bag_of_each_read
from memshard.models.loss import IGNORE, chunked, token_losses
from memshard.models.memory.table import externalize_tables, find_tables
from memshard.models.random import RandomKey
from memshard.models.recompute.checkpointing import Checkpointing, Recompute
from memshard.models.transformer import Transformer
from tests.live_bytes import LiveBytes
from tests.models.passes import LENGTH, tiny_context
from tests.models.tiny import tiny_config, tiny_model, tiny_tokens

_LSH = {"pattern": ("lsh", "local"), "chunk": 4, "buckets": 2, "heads_at_once": 1}
_GRID = 1e-3  # its steps pass a change of the last bit on as a whole step


@pytest.mark.parametrize("chunk", [1, 4, 9, 20])
@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize("residual", ["pre", "post", "reversible"])
def test_chunked_losses(residual: Any, tie_head: bool, chunk: int) -> None:
    model, ctx = (
        tiny_model(tiny_config({"layers": ()}, residual=residual, tie_head=tie_head)),
        tiny_context(),
    )
    targets = tiny_tokens(3, LENGTH, seed=1)
    targets[0, 3:5] = IGNORE
    probe = torch.randn(3, LENGTH, dtype=torch.float64)
    results = []
    for whole in (True, False):
        copy = deepcopy(model)
        copy.configure(Recompute(chunk=0 if whole else chunk))
        y, _ = copy(tiny_tokens(3, LENGTH), ctx, targets=None if whole else targets)
        losses = token_losses(y, targets) if whole else y
        (losses * probe).sum().backward()
        results.append(
            [
                losses.detach(),
                *(parameter.grad for parameter in copy.parameters() if parameter.grad is not None),
            ]
        )
    tolerance = _GRID if residual == "reversible" else 1e-12
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("which", ["plain", "padding"])
@pytest.mark.parametrize("kind", ["none", "full", "reversible"])
@pytest.mark.parametrize(
    "memory",
    [
        {"layers": ()},
        {"query_norm": "layer", "mode": "add"},
        {"query_norm": "rms", "share": True, "kind": "peer"},
    ],
    ids=str,
)
def test_chunked_models(memory: dict[str, Any], kind: Any, which: str) -> None:
    """Values, gradients, and the reads that hidden tables collect in pieces are those
    of the whole.
    """
    reversible = kind == "reversible"
    changes: dict[str, Any] = {"residual": "reversible"} if reversible else {}
    model = tiny_model(
        tiny_config(memory=memory, mixer=_LSH, dropout=0.2, **changes), spread=0.1
    ).train()
    externalize_tables(model)
    results = []
    for chunk in (0, 2):
        copy = deepcopy(model)
        copy.configure(Recompute("none" if reversible else kind, chunk, check_inversion=True))
        losses, _ = copy(
            tiny_tokens(3, LENGTH), tiny_context(which), targets=tiny_tokens(3, LENGTH, seed=1)
        )
        if which == "padding":
            losses = losses * tiny_context(which).padding
        losses.sum().backward()
        results.append(
            [
                losses.detach(),
                *(p.grad for p in copy.parameters()),
                *(_table_gradient(table) for _, table in find_tables(copy)),
            ]
        )
        with torch.no_grad():
            evaluated = copy.eval()(
                tiny_tokens(3, LENGTH), tiny_context(which), targets=tiny_tokens(3, LENGTH, seed=1)
            )[0]
        results[-1].append(
            evaluated if which == "plain" else evaluated * tiny_context(which).padding
        )
    tolerance = _GRID if reversible else 1e-10
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def _table_gradient(table: Any) -> Tensor:
    gradient = torch.zeros(table.slots, table.dim, dtype=torch.float64)
    for read in table.reads:
        bags = bag_of_each_read(read.offsets, len(read.rows))
        gradient.index_add_(
            0, read.rows, read.weights[:, None].double() * read.upstream[bags].double()
        )
    return gradient


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_past_of_a_chunked_model_is_bit_equal(checkpointing: Checkpointing) -> None:
    for changes in ({}, {"residual": "reversible"}):
        model = tiny_model(
            tiny_config({"query_norm": "layer"}, mixer=_LSH, dropout=0.2, **changes)
        ).train()
        model.configure(Recompute("none" if changes else checkpointing, chunk=3))
        tokens, other = tiny_tokens(2, LENGTH), tiny_tokens(2, LENGTH, seed=5)
        other[:, :5] = tokens[:, :5]
        ctx = Context(torch.arange(LENGTH).expand(2, -1), random=RandomKey(0, 0, torch.arange(2)))
        first, second = (model(x, ctx)[0] for x in (tokens, other))
        assert torch.equal(first[:, :5], second[:, :5]) and not torch.equal(
            first[:, 5:], second[:, 5:]
        )


def test_neither_logits_nor_hidden_layers_are_whole_in_memory() -> None:
    length, vocabulary = 1024, 4096
    hidden, weight = (
        torch.randn(1, length, 16, requires_grad=True),
        torch.randn(vocabulary, 16, requires_grad=True),
    )
    targets = torch.randint(vocabulary, (1, length))
    with LiveBytes() as live:
        chunked(
            lambda x, y: token_losses(x @ weight.mT, y), hidden, targets, chunk=32
        ).sum().backward()
    assert live.peak < length * vocabulary * 4 / 4

    mixer, feedforward = MixerConfig(heads=2, kind="local", window=8), FeedForwardConfig(hidden=512)
    config = ModelConfig(
        vocab_size=23,
        layers=2,
        dim=16,
        max_length=length,
        mixer=mixer,
        feedforward=feedforward,
        residual="reversible",
    )
    model = Transformer(config)
    assert model.blocks[0].feedforward is not None
    peaks = []
    for chunk in (0, 64):
        model.configure(Recompute(chunk=chunk))
        with LiveBytes() as live:
            model(tiny_tokens(2, length), targets=tiny_tokens(2, length))[0].sum().backward()
        peaks.append(live.peak)
    assert peaks[1] < 0.5 * peaks[0]
