"""The state of LSH attention in decoding: which tokens are in which bucket, and what the newest one
sees of them.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.layers.convolution import RecentRows

PADDING = -1
"""The group of padding tokens."""


@dataclass(frozen=True)
class BucketState:
    """All keys and values, and the newest tokens of every bucket.

    keys, values: [batch, heads, capacity, head dim]. groups: [batch, heads, rounds, capacity]
    int64, bucket of each token + buckets x number of its document; PADDING for padding. newest:
    [batch, heads, rounds, buckets, 2 chunk] int64, a ring buffer of positions in the cache, twice
    as many as a token sees so that tokens can be rolled back. counts: [batch, heads, rounds,
    buckets] int64, tokens of the current document. number, documents: [batch] int64, the current
    document as counted here, and as the context calls it. length: tokens seen. recent: state of the
    convolutions, if any.
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


def attend_newest(q: Tensor, state: BucketState, chunk: int) -> Tensor:
    """Return the output of the newest token, [batch, heads, 1, head dim], from rounds x chunk
    candidates. q: its query, of the same shape.
    """
    group = state.groups[..., state.length - 1]
    ring = 2 * chunk
    bucket = (group % state.counts.shape[-1])[..., None]
    count = state.counts.gather(-1, bucket)
    back = count - 1 - torch.arange(chunk, device=q.device)
    # The newest `chunk` entries of the ring, going back from the last.
    places = (
        state.newest.gather(3, bucket[..., None].expand(-1, -1, -1, 1, ring))
        .squeeze(3)
        .gather(-1, back % ring)
    )
    places = (
        places.masked_fill((back < 0) | (group == PADDING)[..., None], -1)
        .flatten(2)
        .sort(-1)
        .values
    )
    # Sorted, a token that was met in several rounds is next to itself: only the first counts.
    legal = (places >= 0) & F.pad(places[..., 1:] != places[..., :-1], (1, 0), value=True)
    index = places.clamp(min=0)[..., None].expand(-1, -1, -1, q.shape[-1])
    scores = (
        (state.keys.gather(2, index) @ q.mT)
        .to(torch.promote_types(q.dtype, torch.float32))
        .masked_fill(~legal[..., None], -torch.inf)
    )
    # Without a legal key the softmax is NaN; such tokens get their own value below.
    weights = scores.softmax(2).nan_to_num().to(q.dtype)
    own_value = state.values[:, :, state.length - 1, None]
    return torch.where(
        legal.any(-1)[..., None, None], weights.mT @ state.values.gather(2, index), own_value
    )


def file_newest(state: BucketState) -> BucketState:
    """Return the state with the newest token in its buckets. Changes `newest` in place."""
    group = state.groups[..., state.length - 1]
    buckets, ring = state.newest.shape[-2:]
    bucket, real = (group % buckets)[..., None], (group != PADDING)[..., None]
    flat = bucket * ring + state.counts.gather(-1, bucket) % ring
    newest = state.newest.flatten(-2)
    # Padding has no place in a bucket, but scatter needs an index: it writes back what is there.
    newest.scatter_(-1, flat, torch.where(real, state.length - 1, newest.gather(-1, flat)))
    return replace(state, counts=state.counts.scatter_add(-1, bucket, real.long()))


def file_all(state: BucketState) -> BucketState:
    """Return the state with the buckets of the current document filled anew, from its beginning."""
    groups = state.groups[..., : state.length]
    buckets, ring = state.newest.shape[-2:]
    # Tokens of other documents and padding go to one extra bucket after the others.
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
    # Several tokens would share a place of the ring, and the order of scatter's writes is
    # undefined: the older ones go to a place that is cut off.
    old = index < counts.gather(-1, ordered) - ring
    flat = torch.where(old, buckets * ring, ordered * ring + index % ring)
    newest = counts.new_zeros(*bucket.shape[:-1], (buckets + 1) * ring).scatter_(-1, flat, places)
    return replace(
        state,
        counts=counts[..., :-1],
        newest=newest.unflatten(-1, (buckets + 1, ring))[..., :-1, :],
    )
