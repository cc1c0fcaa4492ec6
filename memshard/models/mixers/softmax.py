"""Softmax attention, with a key-value cache behind the mixer contract.

A mixer is called as `mixer(x, ctx, state) -> (y, state)`. Without a state it sees the tokens of x alone; with one, x
continues what the state has seen. `init_state`, `reorder`, `rollback` and `reset` serve decoding, beam search and
carried text.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.context import Context
from memshard.models.linear import Projection
from memshard.models.mixers.per_document import DENSE_LENGTH, attend_per_document
from memshard.models.position import rotate


@dataclass(frozen=True)
class KeyValueState:
    """What softmax attention remembers: buffers of a fixed capacity, of which `length` tokens are filled.

    keys, values: [batch, heads, capacity, head dim]; visible: [batch, capacity] bool, False for padding and for what
    `reset` forgot; documents: [batch, capacity] int64.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor
    documents: Tensor
    length: int = 0


class SoftmaxMixer(nn.Module):
    """Causal multi-head attention by torch's fused scaled dot-product kernels.

    rotary: turn queries and keys by their positions.
    """

    def __init__(self, dim: int, heads: int, rotary: bool = False, output_scale: float = 1.0) -> None:
        super().__init__()
        self.heads = heads
        self.rotary = rotary
        self.query = Projection(dim, dim)
        self.key = Projection(dim, dim)
        self.value = Projection(dim, dim)
        self.output = Projection(dim, dim, scale=output_scale)

    def forward(self, x: Tensor, ctx: Context, state: KeyValueState | None = None) -> tuple[Tensor, KeyValueState | None]:
        """x: [batch, length, dim]; returns the same shape and the advanced state. ValueError if the state is full."""
        q, k, v = (self._split(project(x)) for project in (self.query, self.key, self.value))
        if self.rotary:
            q, k = rotate(q, ctx.positions), rotate(k, ctx.positions)
        if state is None:
            y = self._attend(q, k, v, ctx)
        else:
            state = _append(state, k, v, ctx)
            y = self._attend_cached(q, state, ctx)
        return self.output(y.transpose(1, 2).flatten(2)), state

    def init_state(self, batch: int, capacity: int) -> KeyValueState:
        """An empty state for `batch` rows of at most `capacity` tokens, on the layer's device in its dtype."""
        weight = self.key.weight
        keys = weight.new_zeros(batch, self.heads, capacity, weight.shape[0] // self.heads)
        visible = torch.zeros(batch, capacity, dtype=torch.bool, device=weight.device)
        return KeyValueState(keys, torch.zeros_like(keys), visible, torch.zeros_like(visible, dtype=torch.long))

    @staticmethod
    def reorder(state: KeyValueState, rows: Tensor) -> KeyValueState:
        """The state whose row i is row rows[i] of this one (beam search). rows: [new batch] int64."""
        return KeyValueState(state.keys[rows], state.values[rows], state.visible[rows], state.documents[rows], state.length)

    @staticmethod
    def rollback(state: KeyValueState, tokens: int) -> KeyValueState:
        """The state before its last `tokens` tokens."""
        return replace(state, length=state.length - tokens)

    @staticmethod
    def reset(state: KeyValueState, rows: Tensor) -> KeyValueState:
        """Forget everything in the given rows (a document ended there). rows: [batch] bool."""
        return replace(state, visible=state.visible & ~rows[:, None])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        masked = ctx.documents is not None or ctx.padding is not None
        if masked and q.shape[2] > DENSE_LENGTH:
            return attend_per_document(q, k, v, ctx)
        mask = ctx.attention_mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    def _attend_cached(self, q: Tensor, state: KeyValueState, ctx: Context) -> Tensor:
        seen, mask = cached_mask(state, ctx, q.shape[2])
        return F.scaled_dot_product_attention(q, state.keys[:, :, seen], state.values[:, :, seen], attn_mask=mask)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _append(state: KeyValueState, k: Tensor, v: Tensor, ctx: Context) -> KeyValueState:
    start, end = state.length, state.length + k.shape[2]
    capacity = state.keys.shape[2]
    if end > capacity:
        raise ValueError(f"the attention state holds {capacity} tokens and {end} are needed: give init_state a larger capacity")
    state.keys[:, :, start:end] = k
    state.values[:, :, start:end] = v
    state.visible[:, start:end] = True if ctx.padding is None else ctx.padding
    state.documents[:, start:end] = 0 if ctx.documents is None else ctx.documents
    return replace(state, length=end)


def cached_mask(state: KeyValueState, ctx: Context, queries: int, window: int | None = None) -> tuple[slice, Tensor]:
    """Which part of the state the newest `queries` tokens may see at all, and each of them: [batch, 1, queries, part] bool.

    window: how many tokens each may see, itself included; None for all.
    """
    length = state.length
    seen = slice(0 if window is None else max(0, length - queries + 1 - window), length)
    slots = torch.arange(seen.start, length, device=state.keys.device)
    own = torch.arange(length - queries, length, device=slots.device)[:, None]
    mask = (slots <= own) & state.visible[:, None, seen]
    if window is not None:
        mask = mask & (slots > own - window)
    if ctx.documents is not None:
        mask = mask & (state.documents[:, None, seen] == ctx.documents[:, :, None])
    return seen, (mask | (slots == own))[:, None]
