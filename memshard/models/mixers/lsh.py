"""Attention among tokens that locality-sensitive hashing finds similar (Kitaev et al. 2020),
strictly causal.

Queries and keys are the same vectors, keys scaled to norm 1. In every round a token sees the last
`chunk` tokens before it in its bucket; what it sees in several rounds counts once; who sees nobody
gets its own value.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.config import ModelConfig
from memshard.models.context import Context
from memshard.models.layers.convolution import Convolutions, RecentRows
from memshard.models.layers.linear import Projection
from memshard.models.lsh.banded import banded_attention
from memshard.models.lsh.by_heads import ByHeads
from memshard.models.lsh.hashing import bucket_count, hash_buckets, total_buckets
from memshard.models.lsh.published import PublishedRule, published_attention
from memshard.models.mixers.mixer import Mixer
from memshard.models.random import fold

_PADDING = -1


@dataclass(frozen=True)
class BucketState:
    """What LSH attention remembers: all keys and values, and of every bucket its newest tokens.

    keys, values: [batch, heads, capacity, head dim]. groups: [batch, heads, rounds, capacity]
    int64, bucket of each token plus buckets x number of its document, -1 for padding. newest:
    [batch, heads, rounds, buckets, 2 chunk] int64, a ring of places, twice what is seen so that
    tokens can be taken back. counts: [batch, heads, rounds, buckets] int64, tokens of the present
    document. number, documents: [batch] int64, of the present document, counted here and as the
    context calls it. recent: of convolutions.
    """

    keys: Tensor
    values: Tensor
    groups: Tensor
    newest: Tensor
    counts: Tensor
    number: Tensor
    documents: Tensor
    length: int = 0
    recent: RecentRows | None = None


class LSHMixer(Mixer):
    """LSH attention.

    rounds: hash rounds, to be changed at any time. chunk: how many tokens of its bucket a token
    sees in a round. buckets: 0 for `bucket_count` of the length. seed: of the rotations; give every
    layer its own. heads_at_once: project and attend so many heads at a time and repeat that in
    backward, so that queries, values and results of all are never in memory; 0 for all. resample:
    in training, let rotations depend on the step too. rule: "strict", or one of
    `published_attention`'s, which are not causal to the letter: no decoding, no packed or padded
    text. convolution: width of Primer's convolutions of queries and values, 0 for none.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        rounds: int = 2,
        chunk: int = 64,
        buckets: int = 0,
        seed: int = 0,
        heads_at_once: int = 0,
        output_scale: float = 1.0,
        resample: bool = False,
        rule: str = "strict",
        convolution: int = 0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.rounds, self.chunk, self.buckets, self.seed, self.heads_at_once = (
            rounds,
            chunk,
            buckets,
            seed,
            heads_at_once,
        )
        self.resample = resample
        self.rule = cast("Literal['strict'] | PublishedRule", rule)
        self.query = Projection(dim, dim)
        self.value = Projection(dim, dim)
        self.output = Projection(dim, dim, scale=output_scale)
        self.convolutions = Convolutions({"query": dim, "value": dim}, convolution)

    @classmethod
    def from_config(cls, config: ModelConfig, layer: int, output_scale: float) -> Self:
        """Return a layer's mixer."""
        settings = config.mixer
        return cls(
            config.dim,
            settings.heads,
            settings.rounds,
            settings.chunk,
            settings.buckets,
            seed=layer,
            heads_at_once=settings.heads_at_once,
            output_scale=output_scale,
            resample=settings.resample,
            rule=settings.rule,
            convolution=settings.convolution,
        )

    @property
    def applies_norm(self) -> bool:
        """Whether heads are processed a few at a time; see `Mixer`."""
        return self.heads_at_once > 0

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        state: BucketState | None = None,
        norm: nn.Module | None = None,
    ) -> tuple[Tensor, BucketState | None]:
        """x: [batch, length, dim]; returns the same shape and, where a state was given, the
        advanced one.

        norm: of `heads_at_once` without a state: what x has to go through first, in pieces.
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
            before = weights[-1].shape[1] - 1 if self.convolutions else 0
            by_heads = ByHeads(
                self.heads,
                self.heads_at_once,
                before,
                partial(self._project_piece, ctx=ctx),
                attend,
            )
            return self.output.summed(by_heads(x, norm, weights, self.output.weight)), None
        y = attend(self._project(x, weights, ctx)[0], slice(0, self.heads))
        return self.output(y.transpose(1, 2).flatten(2)), None

    def init_state(self, batch: int, capacity: int) -> BucketState:
        """An empty state for `batch` rows of at most `capacity` tokens; buckets are those of that
        length.
        """
        if self.rule != "strict":
            raise ValueError(
                f"model.mixer.rule {self.rule} lets tokens depend on later ones, so there is no "
                "decoding: use strict"
            )
        weight = self.value.weight
        keys = weight.new_zeros(batch, self.heads, capacity, weight.shape[0] // self.heads)
        buckets = total_buckets(self.buckets or bucket_count(capacity, self.chunk))
        places = torch.zeros(
            batch,
            self.heads,
            self.rounds,
            buckets,
            2 * self.chunk,
            dtype=torch.int64,
            device=weight.device,
        )
        groups = places.new_full((batch, self.heads, self.rounds, capacity), _PADDING)
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
        """The state whose row i is row rows[i] of this one (beam search). rows: [new batch]
        int64.
        """
        kept = {
            name: value[rows] for name, value in vars(state).items() if isinstance(value, Tensor)
        }
        return BucketState(
            **kept, length=state.length, recent=state.recent and state.recent.reorder(rows)
        )

    def rollback(self, state: BucketState, tokens: int) -> BucketState:
        """The state before its last `tokens` tokens, which must belong to the present document.
        ValueError beyond `chunk` tokens.
        """
        if tokens > self.chunk:
            raise ValueError(
                f"an LSH state takes back at most its chunk of {self.chunk} tokens, not {tokens}; "
                "keep the earlier state"
            )
        last = state.groups[..., state.length - tokens : state.length]
        taken = torch.zeros_like(state.counts).scatter_add_(
            -1, last % state.counts.shape[-1], (last != _PADDING).long()
        )
        recent = state.recent and state.recent.rollback(tokens)
        return replace(
            state, counts=state.counts - taken, length=state.length - tokens, recent=recent
        )

    @staticmethod
    def reset(state: BucketState, rows: Tensor) -> BucketState:
        """Forget everything in the given rows (a document ended there). rows: [batch] bool."""
        counts, recent = (
            state.counts * ~rows[:, None, None, None],
            state.recent and state.recent.reset(rows),
        )
        return replace(state, counts=counts, number=state.number + rows, recent=recent)

    def _attend_heads(
        self, projected: Sequence[Tensor], heads: slice, numbers: Tensor | None, ctx: Context
    ) -> Tensor:
        """Results of some heads, [batch, heads, length, head dim], of their queries, keys and
        values.
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
        seed = (
            fold(self.seed, ctx.random.step)
            if self.resample and ctx.random is not None
            else self.seed
        )
        buckets = self.buckets or bucket_count(q.shape[2] - ctx.padding_tokens, self.chunk)
        return self._attend(q, k, v, self._groups(q, heads, buckets, numbers, ctx.padding, seed))

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
        """What belongs to heads before attention: [head dims, ...] each."""
        return [self.query.weight, self.value.weight, *self.convolutions.kernels()]

    def _project(
        self, x: Tensor, weights: Sequence[Tensor], ctx: Context, recent: RecentRows | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], RecentRows | None]:
        """Queries, keys and values, [batch, heads, length, head dim], of the heads whose weights
        these are, and what convolutions remember where something was.
        """
        width = self.value.weight.shape[0] // self.heads
        found, recent = self.convolutions(
            [F.linear(x, weight) for weight in weights[:2]], ctx, recent, weights[2:]
        )
        q, v = (each.unflatten(-1, (-1, width)).transpose(1, 2) for each in found)
        return (q, _unit(q), v), recent

    def _project_piece(
        self, x: Tensor, weights: Sequence[Tensor], tokens: slice, ctx: Context
    ) -> Sequence[Tensor]:
        documents, padding = (
            None if each is None else each[:, tokens] for each in (ctx.documents, ctx.padding)
        )
        return self._project(x, weights, Context(ctx.positions[:, tokens], documents, padding))[0]

    def _groups(
        self,
        q: Tensor,
        heads: slice,
        buckets: int,
        numbers: Tensor | None,
        padding: Tensor | None,
        seed: int,
    ) -> Tensor:
        """[batch, heads, rounds, length] int64. numbers: [batch, length] of documents."""
        found = hash_buckets(
            q.detach().transpose(0, 1), buckets, self.rounds, seed, self.first_head + heads.start
        )
        groups = found.permute(2, 0, 1, 3)
        if numbers is not None:
            groups = groups + total_buckets(buckets) * numbers[:, None, None]
        return groups if padding is None else groups.masked_fill(~padding[:, None, None], _PADDING)

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
            changed[:, 0] &= state.documents >= 0
            numbers, documents = numbers + changed.cumsum(1), ctx.documents[:, -1]
        buckets = self.buckets or bucket_count(capacity, self.chunk)
        state.keys[:, :, start:end], state.values[:, :, start:end] = k, v
        state.groups[..., start:end] = self._groups(
            q, slice(0, self.heads), buckets, numbers, ctx.padding, self.seed
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
        if x.shape[1] == 1:
            return self._attend_newest(q, state).transpose(1, 2).flatten(2), _file_newest(state)
        keys, values, groups = (
            state.keys[:, :, :end],
            state.values[:, :, :end],
            state.groups[..., :end],
        )
        # Of earlier tokens only keys and values count; their queries are whatever is there.
        y = self._attend(
            torch.cat((keys[:, :, :start], q.to(keys.dtype)), 2), keys, values, groups
        )[:, :, start:]
        return y.transpose(1, 2).flatten(2), _file_all(state)

    def _attend_newest(self, q: Tensor, state: BucketState) -> Tensor:
        """The output for the token at the end: [batch, heads, 1, head dim], of rounds x chunk
        candidates.
        """
        group = state.groups[..., state.length - 1]
        ring = 2 * self.chunk
        bucket = (group % state.counts.shape[-1])[..., None]
        count = state.counts.gather(-1, bucket)
        back = count - 1 - torch.arange(self.chunk, device=q.device)
        places = (
            state.newest.gather(3, bucket[..., None].expand(-1, -1, -1, 1, ring))
            .squeeze(3)
            .gather(-1, back % ring)
        )
        places = (
            places.masked_fill((back < 0) | (group == _PADDING)[..., None], -1)
            .flatten(2)
            .sort(-1)
            .values
        )
        legal = (places >= 0) & F.pad(places[..., 1:] != places[..., :-1], (1, 0), value=True)
        index = places.clamp(min=0)[..., None].expand(-1, -1, -1, q.shape[-1])
        scores = (
            (state.keys.gather(2, index) @ q.mT)
            .to(torch.promote_types(q.dtype, torch.float32))
            .masked_fill(~legal[..., None], -torch.inf)
        )
        weights = scores.softmax(2).nan_to_num().to(q.dtype)
        own = state.values[:, :, state.length - 1, None]
        return torch.where(
            legal.any(-1)[..., None, None], weights.mT @ state.values.gather(2, index), own
        )


def _file_newest(state: BucketState) -> BucketState:
    """Put the last token into its buckets."""
    group = state.groups[..., state.length - 1]
    buckets, ring = state.newest.shape[-2:]
    bucket, real = (group % buckets)[..., None], (group != _PADDING)[..., None]
    flat = bucket * ring + state.counts.gather(-1, bucket) % ring
    newest = state.newest.flatten(-2)
    newest.scatter_(-1, flat, torch.where(real, state.length - 1, newest.gather(-1, flat)))
    return replace(state, counts=state.counts.scatter_add(-1, bucket, real.long()))


def _file_all(state: BucketState) -> BucketState:
    """Put all tokens of the present document into their buckets, from the beginning."""
    groups = state.groups[..., : state.length]
    buckets, ring = state.newest.shape[-2:]
    # Tokens that do not count go to one bucket more, behind the others.
    bucket = torch.where(
        groups // buckets == state.number[:, None, None, None], groups % buckets, buckets
    )
    ordered, places = bucket.sort(dim=-1, stable=True)
    counts = state.counts.new_zeros(*bucket.shape[:-1], buckets + 1).scatter_add_(
        -1, bucket, torch.ones_like(bucket)
    )
    index = torch.arange(state.length, device=groups.device) - (counts.cumsum(-1) - counts).gather(
        -1, ordered
    )
    old = index < counts.gather(-1, ordered) - ring
    flat = torch.where(old, buckets * ring, ordered * ring + index % ring)
    newest = counts.new_zeros(*bucket.shape[:-1], (buckets + 1) * ring).scatter_(-1, flat, places)
    return replace(
        state,
        counts=counts[..., :-1],
        newest=newest.unflatten(-1, (buckets + 1, ring))[..., :-1, :],
    )


def _unit(q: Tensor) -> Tensor:
    return F.normalize(q.to(torch.promote_types(q.dtype, torch.float32)), dim=-1, eps=1e-6).to(
        q.dtype
    )


def _changes(documents: Tensor, before: Tensor) -> Tensor:
    """Where a document begins. documents: [batch, length]; before: [batch], of the token before the
    first.
    """
    return torch.cat((before[:, None], documents[:, :-1]), 1) != documents
