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
            masked = ctx.documents is not None or ctx.padding is not None
            if masked and x.shape[1] > DENSE_LENGTH:
                y = attend_per_document(q, k, v, ctx)
            else:
                mask = ctx.attention_mask
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        else:
            state = _append(state, k, v, ctx)
            seen = slice(0, state.length)
            mask = _cached_mask(state, ctx, x.shape[1])
            y = F.scaled_dot_product_attention(q, state.keys[:, :, seen], state.values[:, :, seen], attn_mask=mask)
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


def _cached_mask(state: KeyValueState, ctx: Context, queries: int) -> Tensor:
    """[batch, 1, queries, length] bool: what the newest `queries` tokens may see of the state."""
    length = state.length
    slots = torch.arange(length, device=state.keys.device)
    own = slots[length - queries :, None]
    mask = (slots <= own) & state.visible[:, None, :length]
    if ctx.documents is not None:
        mask = mask & (state.documents[:, None, :length] == ctx.documents[:, :, None])
    return (mask | (slots == own))[:, None]
