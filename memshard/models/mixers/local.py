"""Softmax attention to a window of recent tokens: exact, and linear in the length."""

from typing import Any, Self

import torch
from torch import Tensor

from memshard.models.config import ModelConfig
from memshard.models.context import Context
from memshard.models.lsh.banded import banded_attention
from memshard.models.mixers.softmax import KeyValueState, SoftmaxMixer, attend_where, cached_mask


class LocalMixer(SoftmaxMixer):
    """Causal attention of every token to the last `window` tokens, itself included."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        rotary: bool = False,
        output_scale: float = 1.0,
        **parts: Any,
    ) -> None:
        super().__init__(dim, heads, rotary, output_scale, **parts)
        self.window = window

    @classmethod
    def from_config(cls, config: ModelConfig, layer: int, output_scale: float) -> Self:
        """Return a layer's mixer."""
        settings = config.mixer
        return cls(
            config.dim,
            settings.heads,
            settings.window,
            rotary=config.position == "rotary",
            output_scale=output_scale,
            convolution=settings.convolution,
            share_qk=settings.share_qk,
            kv_heads=settings.kv_heads,
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        groups = torch.zeros_like(ctx.positions) if ctx.documents is None else ctx.documents
        if ctx.padding is not None:
            groups = groups.masked_fill(~ctx.padding, -1)
        # Heads become rows of their own; a window over all tokens is one
        # group, and padding another.
        rows = groups[:, None].expand(-1, q.shape[1], -1).reshape(-1, 1, q.shape[2])
        # `banded_attention` takes scores as they are.
        q = q * q.shape[-1] ** -0.5
        if self.kv_heads < self.heads:
            k, v = (
                tensor.repeat_interleave(self.heads // self.kv_heads, dim=1) for tensor in (k, v)
            )
        y = banded_attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            rows,
            self.window,
            self.window,
            itself=True,
        )
        return y.unflatten(0, q.shape[:2])

    def _attend_cached(self, q: Tensor, state: KeyValueState, ctx: Context) -> Tensor:
        seen, mask = cached_mask(state, ctx, q.shape[2], self.window)
        return attend_where(mask, q, state.keys[:, :, seen], state.values[:, :, seen])
