"""Attention among tokens that locality-sensitive hashing finds similar (Kitaev et al. 2020),
strictly causal.

Queries and keys are the same vectors, keys scaled to norm 1. In every round a token sees the last
`chunk` tokens before it in its bucket. A token seen in several rounds counts once; a token that
sees no other gets its own value.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.config import ModelConfig
from memshard.models.context import Context
from memshard.models.layers.convolution import Convolutions, RecentRows
from memshard.models.layers.linear import Projection, cast_once
from memshard.models.lsh.banded import banded_attention
from memshard.models.lsh.bucket_state import (
    PADDING,
    BucketState,
    attend_newest,
    file_all,
    file_newest,
)
from memshard.models.lsh.by_heads import ByHeads
from memshard.models.lsh.hashing import hash_buckets, total_buckets
from memshard.models.lsh.published import PublishedRule, published_attention, unit_keys
from memshard.models.mixers.mixer import Mixer
from memshard.models.random import fold


class LSHMixer(Mixer):
    """LSH attention.

    buckets: number of buckets of a round; `bucket_count` of the training length is a good one.
    rounds: number of hash rounds. chunk: number of tokens of its bucket that a token sees in a
    round. All three may be changed at any time. seed: of the rotations, a different one for each
    layer. heads_at_once: process this many heads at a time and recompute them in backward, so that
    queries, values and results of all heads are never in memory together; 0: all at once. resample:
    let rotations in training also depend on the step. rule: "strict", or one of
    `published_attention`, which are not strictly causal: no decoding, no packed or padded text.
    convolution: width of Primer's convolutions of queries and values, 0 for none.
    """

    one_graph = False  # rotations are kept from pass to pass

    def __init__(
        self,
        dim: int,
        heads: int,
        buckets: int,
        rounds: int = 2,
        chunk: int = 64,
        seed: int = 0,
        heads_at_once: int = 0,
        output_scale: float = 1.0,
        resample: bool = False,
        rule: str = "strict",
        convolution: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.heads_at_once = heads, heads_at_once
        self.buckets, self.rounds, self.chunk = buckets, rounds, chunk
        self.seed, self.resample = seed, resample
        self.rule = cast("Literal['strict'] | PublishedRule", rule)
        self.query = Projection(dim, dim)
        self.value = Projection(dim, dim)
        self.output = Projection(dim, dim, scale=output_scale)
        self.convolutions = Convolutions({"query": dim, "value": dim}, convolution)

    @classmethod
    def from_config(cls, config: ModelConfig, layer: int, output_scale: float) -> Self:
        """Return a layer's mixer. ValueError where nothing says the number of buckets."""
        settings = config.mixer
        if not settings.buckets:
            # Were it taken from the text at hand, later tokens and padding would change a token's
            # output.
            if config.max_length is None:
                raise ValueError(
                    "model.mixer.buckets is 0, and without model.max_length there is no length "
                    "to choose the number of buckets for: set one of them"
                )
            settings = settings.for_length(config.max_length)
        return cls(
            config.dim,
            settings.heads,
            settings.buckets,
            settings.rounds,
            settings.chunk,
            seed=layer,
            heads_at_once=settings.heads_at_once,
            output_scale=output_scale,
            resample=settings.resample,
            rule=settings.rule,
            convolution=settings.convolution,
        )

    @property
    def applies_norm(self) -> bool:
        """True if heads are processed a few at a time; see `Mixer`."""
        return self.heads_at_once > 0

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        state: BucketState | None = None,
        norm: nn.Module | None = None,
    ) -> tuple[Tensor, BucketState | None]:
        """Return [batch, length, dim] and, where a state was given, the advanced one.

        norm: for `heads_at_once` without a state: applied to x first, a part of x at a time.
        """
        if state is not None:
            y, state = self._continue(x, ctx, state)
            return self.output(y), state
        numbers = (
            None
            if ctx.documents is None
            else _changes(ctx.documents, ctx.documents[:, 0]).cumsum(1)
        )
        weights, attend = self._weights(), partial(self._attend_heads, numbers=numbers, ctx=ctx)
        if self.heads_at_once:
            # The convolutions of a part of the tokens read K - 1 tokens before it.
            before = weights[-1].shape[1] - 1 if self.convolutions else 0
            by_heads = ByHeads(
                self.heads,
                self.heads_at_once,
                before,
                partial(self._project_span, ctx=ctx),
                attend,
            )
            return self.output.summed(by_heads(x, norm, weights, self.output.weight)), None
        y = attend(self._project(x, weights, ctx)[0], slice(0, self.heads))
        return self.output(y.transpose(1, 2).flatten(2)), None

    def init_state(self, batch: int, capacity: int) -> BucketState:
        """Return an empty state for `batch` rows of at most `capacity` tokens. ValueError for
        published rules.
        """
        if self.rule != "strict":
            raise ValueError(
                f"model.mixer.rule {self.rule} lets tokens depend on later ones, so there is no "
                "decoding: use strict"
            )
        weight = self.value.weight
        keys = weight.new_zeros(batch, self.heads, capacity, weight.shape[0] // self.heads)
        buckets = total_buckets(self.buckets)
        places = torch.zeros(
            batch,
            self.heads,
            self.rounds,
            buckets,
            2 * self.chunk,
            dtype=torch.int64,
            device=weight.device,
        )
        groups = places.new_full((batch, self.heads, self.rounds, capacity), PADDING)
        number = places.new_zeros(batch)
        recent = self.convolutions.nothing_recent(batch)
        return BucketState(
            keys,
            torch.zeros_like(keys),
            groups,
            places,
            places[..., 0].clone(),
            number,
            number - 1,
            recent=recent,
        )

    @staticmethod
    def reorder(state: BucketState, rows: Tensor) -> BucketState:
        """Return the state whose row i is row rows[i] of this one. rows: [new batch] int64."""
        kept = {
            name: value[rows] for name, value in vars(state).items() if isinstance(value, Tensor)
        }
        return BucketState(
            **kept, length=state.length, recent=state.recent and state.recent.reorder(rows)
        )

    def rollback(self, state: BucketState, tokens: int) -> BucketState:
        """Return the state before its last `tokens` tokens, which must belong to the current
        document. ValueError beyond `chunk` tokens.
        """
        if tokens > self.chunk:
            raise ValueError(
                f"an LSH state takes back at most its chunk of {self.chunk} tokens, not {tokens}; "
                "keep the earlier state"
            )
        # Only the counts go back. The rings are twice as long as a token looks, so of `chunk`
        # tokens at most none has overwritten what the earlier tokens still see.
        last = state.groups[..., state.length - tokens : state.length]
        taken = torch.zeros_like(state.counts).scatter_add_(
            -1, last % state.counts.shape[-1], (last != PADDING).long()
        )
        recent = state.recent and state.recent.rollback(tokens)
        return replace(
            state, counts=state.counts - taken, length=state.length - tokens, recent=recent
        )

    @staticmethod
    def reset(state: BucketState, rows: Tensor) -> BucketState:
        """Forget everything in the given rows (a document ended there). rows: [batch] bool."""
        # Empty buckets, and a new document number, which no earlier token's group has.
        counts, recent = (
            state.counts * ~rows[:, None, None, None],
            state.recent and state.recent.reset(rows),
        )
        return replace(state, counts=counts, number=state.number + rows, recent=recent)

    def _attend_heads(
        self, projected: Sequence[Tensor], heads: slice, numbers: Tensor | None, ctx: Context
    ) -> Tensor:
        """Return the results of some heads, [batch, heads, length, head dim]. projected: their
        queries, keys and values.
        """
        q, k, v = projected
        if self.rule != "strict" and (
            numbers is not None or ctx.padding is not None or ctx.padding_tokens
        ):
            raise ValueError(
                f"model.mixer.rule {self.rule} knows neither documents nor padding (which "
                "parallel.tensor adds unless it divides "
                "data.length): use strict"
            )
        seed = self.seed
        if self.resample and ctx.random is not None:
            assert isinstance(ctx.random.step, int)
            seed = fold(seed, ctx.random.step)
        return self._attend(q, k, v, self._groups(q, heads, numbers, ctx.padding, seed))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, groups: Tensor) -> Tensor:
        rows = [tensor.flatten(0, 1) for tensor in (q, k, v, groups)]
        if self.rule != "strict":
            return published_attention(
                rows[0], rows[1], rows[2], rows[3], self.chunk, self.rule
            ).unflatten(0, q.shape[:2])
        return banded_attention(
            rows[0], rows[1], rows[2], rows[3], self.chunk, self.chunk
        ).unflatten(0, q.shape[:2])

    def _weights(self) -> list[Tensor]:
        """Return the weights whose rows belong to heads, [head dims, ...] each."""
        return [self.query.weight, self.value.weight, *self.convolutions.kernels()]

    def _project(
        self, x: Tensor, weights: Sequence[Tensor], ctx: Context, recent: RecentRows | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], RecentRows | None]:
        """Return queries, keys and values, [batch, heads, length, head dim], of the heads whose
        rows of the weights are given, and the convolutions' advanced state if `recent` is given.
        """
        width = self.value.weight.shape[0] // self.heads
        x = cast_once(x)
        projected = [F.linear(x, weight) for weight in weights[:2]]
        if ctx.values is not None:
            projected[1] = projected[1] + ctx.values.to(projected[1].dtype)
        projected, recent = self.convolutions(projected, ctx, recent, weights[2:])
        q, v = (tensor.unflatten(-1, (-1, width)).transpose(1, 2) for tensor in projected)
        return (q, unit_keys(q, self.rule), v), recent

    def _project_span(
        self, x: Tensor, weights: Sequence[Tensor], tokens: slice, ctx: Context
    ) -> Sequence[Tensor]:
        documents, padding = (
            None if field is None else field[:, tokens] for field in (ctx.documents, ctx.padding)
        )
        return self._project(x, weights, Context(ctx.positions[:, tokens], documents, padding))[0]

    def _groups(
        self,
        q: Tensor,
        heads: slice,
        numbers: Tensor | None,
        padding: Tensor | None,
        seed: int,
    ) -> Tensor:
        """Return the group of each token, [batch, heads, rounds, length] int64. numbers: [batch,
        length], of documents.
        """
        # No gradient through the argmax of hashing. Rotations differ by head: the number of the
        # first head counts over all ranks, so that tensor-parallel ranks draw what one rank would.
        hashed = hash_buckets(
            q.detach().transpose(0, 1),
            self.buckets,
            self.rounds,
            seed,
            self.first_head + heads.start,
        )
        groups = hashed.permute(2, 0, 1, 3)
        if numbers is not None:
            # Each document has its own range of groups, so that no bucket
            # reaches into another document.
            groups = groups + total_buckets(self.buckets) * numbers[:, None, None]
        return groups if padding is None else groups.masked_fill(~padding[:, None, None], PADDING)

    def _continue(self, x: Tensor, ctx: Context, state: BucketState) -> tuple[Tensor, BucketState]:
        start, end = state.length, state.length + x.shape[1]
        capacity = state.keys.shape[2]
        if end > capacity:
            raise ValueError(
                f"the attention state holds {capacity} tokens and {end} are needed: give "
                "init_state a larger capacity"
            )
        (q, k, v), recent = self._project(x, self._weights(), ctx, state.recent)
        numbers, documents = state.number[:, None].expand(-1, x.shape[1]), state.documents
        if ctx.documents is not None:
            changed = _changes(ctx.documents, state.documents)
            # -1 is the state before any token: nothing ended there.
            changed[:, 0] &= state.documents >= 0
            numbers, documents = numbers + changed.cumsum(1), ctx.documents[:, -1]
        state.keys[:, :, start:end], state.values[:, :, start:end] = k, v
        state.groups[..., start:end] = self._groups(
            q, slice(0, self.heads), numbers, ctx.padding, self.seed
        )
        fresh = numbers[:, -1] == state.number
        counts = state.counts * fresh[:, None, None, None]
        state = replace(
            state,
            counts=counts,
            number=numbers[:, -1],
            documents=documents,
            length=end,
            recent=recent,
        )
        # Decoding: one query against its buckets' rings costs rounds x chunk
        # keys, whatever the length.
        if x.shape[1] == 1:
            return attend_newest(q, state, self.chunk).transpose(1, 2).flatten(2), file_newest(
                state
            )
        keys, values, groups = (
            state.keys[:, :, :end],
            state.values[:, :, :end],
            state.groups[..., :end],
        )
        # Only the new tokens' results are used: fill up the queries with keys.
        y = self._attend(
            torch.cat((keys[:, :, :start], q.to(keys.dtype)), 2), keys, values, groups
        )[:, :, start:]
        return y.transpose(1, 2).flatten(2), file_all(state)


def _changes(documents: Tensor, before: Tensor) -> Tensor:
    """Return where a document begins, [batch, length] bool. documents: [batch, length]; before:
    [batch], the document of the token before the first one.
    """
    return torch.cat((before[:, None], documents[:, :-1]), 1) != documents
