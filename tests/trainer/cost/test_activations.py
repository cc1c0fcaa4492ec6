from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.models.config import (
    FeedForwardConfig,
    MemoryConfig,
    MixerConfig,
    ModelConfig,
    NgramConfig,
)
from memshard.models.context import Context
from memshard.models.loss import token_losses
from memshard.models.memory.key_use import KeyUse
from memshard.models.memory.table import externalize_tables
from memshard.models.random import RandomKey
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.transformer import Transformer
from memshard.trainer.cost.activations import activation_bytes
from memshard.trainer.cost.parameters import count_parameters
from tests.live_bytes import LiveBytes
from tests.trainer.cost.models import MEMORY, MODEL, NGRAM


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        replace(
            MODEL,
            memory=MemoryConfig(),
            feedforward=FeedForwardConfig(activation="swiglu"),
            vocab_size=3000,
        ),
        replace(
            MODEL,
            memory=replace(MEMORY, query_norm="rms", gate=True, value_dim=96, mode="add"),
            norm="rms",
            dropout=0.1,
        ),
        replace(
            MODEL,
            memory=replace(MEMORY, layers=(0, 1, 2), query_norm="lagged", share=True),
            residual="post",
        ),
        replace(
            MODEL,
            position="rotary",
            feedforward=FeedForwardConfig(activation="relu"),
            memory=MemoryConfig(),
            tie_head=False,
        ),
        replace(MODEL, memory=replace(MEMORY, keys=200, topk=32, query_norm="none")),
        replace(MODEL, memory=replace(MEMORY, kind="peer", topk=32)),
        replace(
            MODEL,
            memory=MemoryConfig(),
            norm="primer",
            mixer=MixerConfig(heads=4, convolution=3, share_qk=True),
            feedforward=FeedForwardConfig(activation="squared_relu", norm="after"),
        ),
        replace(
            MODEL,
            memory=MemoryConfig(),
            mixer=MixerConfig(heads=4, convolution=3, kv_heads=2),
            dropout=0.1,
        ),
        replace(MODEL, ngram=NGRAM),
        replace(MODEL, memory=MemoryConfig(), ngram=replace(NGRAM, value_dim=48, convolution=0)),
        replace(
            MODEL,
            memory=MemoryConfig(),
            ngram=NgramConfig(layers=(0, 2), rule="token", place="replace", gate="glu"),
        ),
        replace(
            MODEL,
            memory=MemoryConfig(),
            ngram=replace(NGRAM, place="feedforward", layers=(1,), value_dim=48),
        ),
        replace(
            MODEL,
            memory=MemoryConfig(),
            ngram=replace(NGRAM, place="embedding", layers=(0,), gate="scalar", value_dim=64),
        ),
        replace(
            MODEL,
            memory=MemoryConfig(),
            mixer=MixerConfig(heads=4, kv_heads=2),
            ngram=NgramConfig(layers=(0, 2), rule="token", place="values", gate="heads"),
        ),
    ],
)
@pytest.mark.parametrize(("document_mask", "balanced"), [(False, False), (True, True)])
def test_activations_are_what_autograd_saves(
    model: ModelConfig, half: bool, document_mask: bool, balanced: bool
) -> None:
    batch, length = 16, 64
    transformer = Transformer(model).train()
    tables = externalize_tables(transformer)
    for _, memory in transformer.memories():
        memory.key_use = KeyUse(memory.heads, model.memory.keys)
        memory.key_use.balance = float(balanced)
    weights = {
        tensor.untyped_storage().data_ptr()
        for tensor in [*transformer.parameters(), *(table.weight for table in tables)]
    }
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(100, (batch, length))
    documents = torch.zeros_like(tokens) if document_mask else None
    ctx = Context(
        torch.arange(length).expand(batch, -1),
        documents,
        random=RandomKey(0, 0, torch.arange(batch)),
    )
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        token_losses(transformer(tokens, ctx)[0], tokens).sum()
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    if half:  # the copies of weights, which the estimate counts as weights
        measured -= 2 * count_parameters(model).active
    sizes = activation_bytes(
        model, length, half=half, document_mask=document_mask, key_balance=balanced
    )
    predicted = batch * length * sizes[0]
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "model",
    [
        replace(MODEL, memory=MemoryConfig(), layers=8, dropout=0.1),
        replace(
            MODEL,
            memory=replace(MEMORY, query_norm="rms", gate=True, mode="add"),
            norm="rms",
            dropout=0.1,
            tie_head=False,
        ),
        replace(MODEL, memory=replace(MEMORY, layers=(0, 1, 2), query_norm="lagged", share=True)),
        replace(MODEL, memory=replace(MEMORY, query_norm="rms"), ngram=NGRAM),
        replace(
            MODEL,
            memory=MemoryConfig(),
            ngram=replace(NGRAM, place="feedforward", gate="glu", value_dim=16),
        ),
    ],
)
@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize(
    ("residual", "checkpointing"),
    [("pre", "none"), ("pre", "full"), ("pre", "selective"), ("reversible", "none")],
)
def test_activations_that_are_computed_again(
    model: ModelConfig, residual: Any, checkpointing: Any, chunk: int
) -> None:
    batch, length = 16, 64
    model = replace(model, residual=residual)
    transformer = Transformer(model).train()
    transformer.configure(Recompute(checkpointing, chunk))
    externalize_tables(transformer)
    for parameter in transformer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(100, (batch, length))
    ctx = Context(
        torch.arange(length).expand(batch, -1), random=RandomKey(0, 0, torch.arange(batch))
    )
    with LiveBytes() as live:
        loss = transformer(tokens, ctx, targets=tokens)[0].sum()
        kept = live.now
        live.peak = 0
        loss.backward()
    predicted, again = (
        batch * length * size
        for size in activation_bytes(model, length, checkpointing=checkpointing, chunk=chunk)
    )
    assert predicted == pytest.approx(kept, rel=0.05)
    if again and not chunk:
        # What is held for a moment, such as gradients inside a branch, comes on top.
        assert 0.95 < live.peak / (predicted + again) < 1.4
