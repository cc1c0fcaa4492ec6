"""Softmax attention with a key-value cache."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.config import ModelConfig
from memshard.models.context import Context
from memshard.models.layers.convolution import RecentRows
from memshard.models.layers.position import rotate
from memshard.models.mixers.per_document import DENSE_LENGTH, attend_per_document
from memshard.models.mixers.projections import HeadProjections


@dataclass(frozen=True)
class KeyValueState:
    """The key-value cache: buffers of a fixed capacity, of which `length` tokens are filled.

    keys, values: [batch, kv heads, capacity, head dim], after convolutions; visible: [batch,
    capacity] bool, False for padding and for what `reset` forgot; documents: [batch, capacity]
    int64; recent: state of the convolutions, if any.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor
    documents: Tensor
    length: int = 0
    recent: RecentRows | None = None


class SoftmaxMixer(HeadProjections):
    """Causal multi-head attention by torch's fused scaled dot-product kernels.

    rotary: rotate queries and keys by their positions, after convolutions.
    parts: arguments of `HeadProjections`.
    """

    def __init__(
        self, dim: int, heads: int, rotary: bool = False, output_scale: float = 1.0, **parts: Any
    ) -> None:
        super().__init__(dim, heads, output_scale, **parts)
        self.rotary = rotary

    @classmethod
    def from_config(cls, config: ModelConfig, layer: int, output_scale: float) -> Self:
        """Return a layer's mixer."""
        settings = config.mixer
        return cls(
            config.dim,
            settings.heads,
            rotary=config.position == "rotary",
            output_scale=output_scale,
            convolution=settings.convolution,
            share_qk=settings.share_qk,
            kv_heads=settings.kv_heads,
        )

    def forward(
        self, x: Tensor, ctx: Context, state: KeyValueState | None = None
    ) -> tuple[Tensor, KeyValueState | None]:
        """Return [batch, length, dim] and the advanced state. ValueError if the state is full."""
        q, k, v, recent = self.project(x, ctx, state.recent if state else None)
        if self.rotary:
            q, k = rotate(q, ctx.positions), rotate(k, ctx.positions)
        if state is None:
            y = self._attend(q, k, v, ctx)
        else:
            state = replace(_append(state, k, v, ctx), recent=recent)
            y = self._attend_cached(q, state, ctx)
        return self.output(y.transpose(1, 2).flatten(2)), state

    def init_state(self, batch: int, capacity: int) -> KeyValueState:
        """Return an empty cache of `capacity` tokens for each of `batch` rows; see `Mixer`."""
        weight = self.key.weight
        # As attention computes: under autocast, fp32 would be cast anew at every token.
        casts = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if casts else weight.dtype
        shape = batch, self.kv_heads, capacity, weight.shape[0] // self.kv_heads
        keys = weight.new_zeros(shape, dtype=dtype)
        visible = torch.zeros(batch, capacity, dtype=torch.bool, device=weight.device)
        documents = torch.zeros_like(visible, dtype=torch.long)
        return KeyValueState(
            keys,
            torch.zeros_like(keys),
            visible,
            documents,
            recent=self.convolutions.nothing_recent(batch),
        )

    @staticmethod
    def reorder(state: KeyValueState, rows: Tensor) -> KeyValueState:
        """Return the state whose row i is row rows[i] of this one. rows: [new batch] int64."""
        recent = state.recent and state.recent.reorder(rows)
        return KeyValueState(
            state.keys[rows],
            state.values[rows],
            state.visible[rows],
            state.documents[rows],
            state.length,
            recent,
        )

    @staticmethod
    def rollback(state: KeyValueState, tokens: int) -> KeyValueState:
        """Return the state before its last `tokens` tokens; see `RecentRows.rollback`."""
        return replace(
            state,
            length=state.length - tokens,
            recent=state.recent and state.recent.rollback(tokens),
        )

    @staticmethod
    def reset(state: KeyValueState, rows: Tensor) -> KeyValueState:
        """Forget everything in the given rows (a document ended there). rows: [batch] bool."""
        return replace(
            state,
            visible=state.visible & ~rows[:, None],
            recent=state.recent and state.recent.reset(rows),
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        masked = ctx.documents is not None or ctx.padding is not None
        # A dense mask has length^2 bools a row, so longer packed texts are
        # attended document by document.
        if masked and q.shape[2] > DENSE_LENGTH:
            return attend_per_document(q, k, v, ctx)
        mask = ctx.attention_mask
        if mask is not None:
            return attend_where(mask, q, k, v)
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.kv_heads < self.heads
        )

    def _attend_cached(self, q: Tensor, state: KeyValueState, ctx: Context) -> Tensor:
        seen, mask = cached_mask(state, ctx, q.shape[2])
        return attend_where(mask, q, state.keys[:, :, seen], state.values[:, :, seen])


def attend_where(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax attention where the mask is True, like q.

    mask: [batch, 1, queries, keys] bool; q: [batch, heads, queries, head dim]; k, v: [batch, kv
    heads, keys, head dim], each for a group of neighbouring query heads.
    """
    heads, kv_heads, queries = q.shape[1], k.shape[1], q.shape[2]
    if not q.is_cuda or heads == kv_heads:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=kv_heads < heads)
    # No fused kernel of CUDA takes groups of heads and a mask, and without one all scores are in
    # memory. The heads of a group are as many more queries of its keys.
    grouped = q.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    mask = mask.repeat(1, 1, heads // kv_heads, 1)
    y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    return y.unflatten(2, (-1, queries)).flatten(1, 2)


def _append(state: KeyValueState, k: Tensor, v: Tensor, ctx: Context) -> KeyValueState:
    start, end = state.length, state.length + k.shape[2]
    capacity = state.keys.shape[2]
    if end > capacity:
        raise ValueError(
            f"the attention state holds {capacity} tokens and {end} are needed: give init_state a "
            "larger capacity"
        )
    # In place: copies of the cache at each token would cost more than the attention. States share
    # buffers, and `rollback` only shortens the filled part.
    state.keys[:, :, start:end] = k
    state.values[:, :, start:end] = v
    state.visible[:, start:end] = True if ctx.padding is None else ctx.padding
    state.documents[:, start:end] = 0 if ctx.documents is None else ctx.documents
    return replace(state, length=end)


def cached_mask(
    state: KeyValueState, ctx: Context, queries: int, window: int | None = None
) -> tuple[slice, Tensor]:
    """Return the slice of the cache that the newest `queries` tokens can see, and which of its
    tokens each of them sees, [batch, 1, queries, slice] bool.

    window: number of tokens that a token sees, itself included; None for all.
    """
    length = state.length
    seen = slice(0 if window is None else max(0, length - queries + 1 - window), length)
    # By place in the cache, not by position: rows padded on the left differ in positions, but all
    # their tokens are in order.
    slots = torch.arange(seen.start, length, device=state.keys.device)
    newest = torch.arange(length - queries, length, device=slots.device)[:, None]
    mask = (slots <= newest) & state.visible[:, None, seen]
    if window is not None:
        mask = mask & (slots > newest - window)
    if ctx.documents is not None:
        mask = mask & (state.documents[:, None, seen] == ctx.documents[:, :, None])
    # Padding sees itself: a row of the mask without a key would give NaN.
    return seen, (mask | (slots == newest))[:, None]
