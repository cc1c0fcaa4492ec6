"""A block without a table is one graph to torch.compile, which serves every step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.models.config import FeedForwardConfig, MixerConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.random import RandomKey
from memshard.models.seq2seq import build_model


def _train(config: ModelConfig, documents: bool, compiled: bool) -> list[Tensor]:
    """Return losses and gradients of three steps, of which the last ones compile nothing."""
    torch.manual_seed(0)
    model = build_model(config.for_length(24))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    results, graphs = [], []
    for step in range(4):
        tokens = torch.arange(48).view(2, 24) * (step + 1) % 50
        ctx = Context(
            torch.arange(24).expand(2, -1),
            (torch.arange(24) // (7 + step)).expand(2, -1) if documents else None,
            random=RandomKey(0, step, torch.arange(2) + 2 * step),
        )
        model.zero_grad()
        loss = model(tokens, ctx, targets=tokens)[0].sum()
        loss.backward()
        results += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[3] and (graphs[0] > 0) == compiled
    return results


# torch hides warnings that it causes itself, which it cannot if they are errors.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.1},
        pytest.param({"mixer": {"kind": "local", "window": 8}}, marks=pytest.mark.slow),
        pytest.param({"mixer": {"kind": "linear"}}, marks=pytest.mark.slow),
        pytest.param({"mixer": {"kind": "delta"}}, marks=pytest.mark.slow),
        pytest.param(
            {"position": "rotary", "norm": "rms", "mixer": {"kv_heads": 1}}, marks=pytest.mark.slow
        ),
        pytest.param(
            {
                "norm": "primer",
                "residual": "post",
                "feedforward": FeedForwardConfig(activation="squared_relu"),
                "mixer": {"convolution": 3, "share_qk": True},
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dropout", "local", "linear", "delta", "rotary", "primer"],
)
def test_a_block_is_one_graph(settings: dict[str, Any], documents: bool) -> None:
    mixer = MixerConfig(heads=2, **settings.get("mixer", {}))
    config = ModelConfig(layers=3, dim=16, vocab_size=50, **settings | {"mixer": mixer})
    pairs = [_train(config, documents, compiled) for compiled in (False, True)]
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-5)
