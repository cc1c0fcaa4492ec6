"""Reversible streams as one would write them for autograd, which keeps all activations.

The clones decide in which order autograd adds gradients: a branch's first, then the stream's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memshard.models.block import Block
from memshard.models.context import Context
from memshard.models.layers.linear import cast_once
from memshard.models.mixers.mixer import MixerState
from memshard.models.random import dropout
from memshard.models.transformer import Transformer


def naive_round(x: Tensor, steps: float = 2.0**14) -> Tensor:
    """Return the nearest multiple of 1 / steps, in fp32 at least; its gradient is 1."""
    x = x.float() if x.dtype.itemsize < 4 else x
    return x + ((x * steps).round() / steps - x).detach()


def naive_block(
    block: Block, x1: Tensor, x2: Tensor, ctx: Context, state: MixerState | None = None
) -> tuple[Tensor, Tensor]:
    """Return y1 = x1 + f(x2) and y2 = x2 + g(y1)."""

    def dropped(y: Tensor, branch: int) -> Tensor:
        if not block.training or not block.dropout_rate or ctx.random is None:
            return y
        return dropout(y, block.dropout_rate, ctx.random, ctx.positions, block.layer, branch)

    h = block.mixer_residual.norm(x2.clone())
    h = h if block.mixer.applies_norm else cast_once(h)
    y1 = x1 + naive_round(dropped(block.mixer(h, ctx, state)[0], 0))
    norm, norm_after = block.feedforward_residual.norm, block.feedforward_residual.norm_after
    h = y1.clone() if norm_after else norm(y1.clone())
    parts = [block.feedforward(h)] if block.feedforward is not None else []
    if block.memory is not None:
        parts.append(block.memory(h, ctx.padding))
    y = sum(parts[1:], parts[0])
    return y1, x2 + naive_round(dropped(norm(y) if norm_after else y, 1))


def naive_reversible(
    model: Transformer, tokens: Tensor, ctx: Context, states: Sequence[MixerState] | None = None
) -> Tensor:
    """Return the logits of a model with `residual: reversible` and learned positions.

    Embeddings must be without dropout.
    """
    assert model.positions is not None
    x = naive_round(model.embedding(tokens) + model.positions(ctx.positions))
    y1, y2 = x.clone(), x.clone()
    for layer, block in enumerate(model.blocks):
        y1, y2 = naive_block(block, y1, y2, ctx, states[layer] if states else None)
    x = (y1 + y2) / 2 if model.head is None else torch.cat((y1, y2), dim=-1)
    x = model.norm(x)
    return model.embedding.logits(x) if model.head is None else model.head(x)
