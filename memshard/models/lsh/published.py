"""LSH attention by the rules of published code, for comparison and to use its weights. Neither rule
is strictly causal.

Chunks are cut from one sorted sequence, so their borders depend on later tokens, and so does what a
token sees: which other buckets under `hf_compat`, which older tokens of its bucket under
`paper_causal`. Such models cannot generate token by token what they predict for whole texts.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PublishedRule = Literal["paper_causal", "hf_compat"]
_HIDDEN, _ITSELF = -1e9, -1e5


def unit_keys(q: Tensor, rule: str) -> Tensor:
    """Return q, [..., d], scaled to norm 1; under "hf_compat" by transformers' formula, whose small
    constant shortens short vectors. In fp32 at least: the constants would be 0 in fp16, and a query
    of zeros NaN.
    """
    exact = q.to(torch.promote_types(q.dtype, torch.float32))
    if rule != "hf_compat":
        return F.normalize(exact, dim=-1, eps=1e-6).to(q.dtype)
    mean_square = exact.square().mean(-1, keepdim=True)
    return (exact * torch.rsqrt(mean_square + 1e-6) / q.shape[-1] ** 0.5).to(q.dtype)


def published_attention(
    q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, chunk: int, rule: PublishedRule
) -> Tensor:
    """Return the attention of each token to earlier tokens in its chunk and the one before, in each
    of R rounds, [N, L, m].

    q, k: [N, L, d]; v: [N, L, m]; buckets: [N, R, L] int64. Scores are fp32. rule: "hf_compat" as
    in transformers and trax: all rounds are sorted together, the first chunk looks at the last one,
    tokens see other buckets, and pairs count once a round. "paper_causal": tokens see only their
    own bucket, and a pair that meets in n rounds counts 1/n in each (Kitaev et al. 2020, appendix
    A). ValueError if L is longer than a chunk and not a multiple of it.
    """
    rows, rounds, length = buckets.shape
    if length <= chunk:
        # As in transformers: one chunk without hashing.
        buckets, chunk, rounds = torch.zeros_like(buckets[:, :1]), length, 1
    if length % chunk:
        raise ValueError(
            f"{length} tokens under the rule {rule}, whose chunks of {chunk} must fill a "
            "sequence: use the strict rule"
        )
    codes = (
        buckets + torch.arange(rounds, device=q.device)[:, None] * (buckets.max() + 1)
    ).flatten(1)
    order = codes.argsort(dim=1, stable=True)
    # The argsort of a permutation is its inverse: where each token went.
    places = order.argsort(dim=1)
    tokens = (order % length).unflatten(1, (-1, chunk))

    def look(x: Tensor) -> Tensor:
        """Extend [N, T, C, ...] to [N, T, 2C, ...]: the chunk before (or the last), then itself."""
        return x if length == chunk and rounds == 1 else torch.cat((x.roll(1, 1), x), 2)

    def tiles(x: Tensor) -> Tensor:
        """Gather [N, L, ...] into [N, T, C, ...]."""
        return x[torch.arange(rows, device=x.device)[:, None, None], tokens]

    scores = (tiles(q) @ look(tiles(k)).mT).to(torch.promote_types(q.dtype, torch.float32))
    query, seen = tokens[..., None], look(tokens)[..., None, :]
    legal = query >= seen
    if rule == "paper_causal":
        met = torch.zeros_like(legal, dtype=torch.int64)
        round_codes, round_chunks = (x.view(rows, rounds, -1) for x in (codes, places // chunk))
        for number in range(rounds):
            code, at = tiles(round_codes[:, number]), tiles(round_chunks[:, number])
            apart = at[..., None] - look(at)[..., None, :]
            met += (code[..., None] == look(code)[..., None, :]) & ((apart == 0) | (apart == 1))
        sorted_codes = codes.gather(1, order).view_as(tokens)
        legal &= sorted_codes[..., None] == look(sorted_codes)[..., None, :]
        # Minus log n is a weight of 1/n.
        scores = scores - met.clamp(min=1).to(scores.dtype).log()
    scores = torch.where(legal, scores, _HIDDEN)
    scores = torch.where(query != seen, scores, _ITSELF)
    logs = scores.logsumexp(-1, keepdim=True)
    out = ((scores - logs).exp().to(v.dtype) @ look(tiles(v))).flatten(1, 2)
    # Back from sorted order to (round, token).
    out = out.gather(1, places[..., None].expand(-1, -1, v.shape[-1])).unflatten(
        1, (rounds, length)
    )
    logs = logs.flatten(1, 2).gather(1, places[..., None]).unflatten(1, (rounds, length))
    # Not softmax: for a token that sees only itself, the published weights add up to 0.9965 or so,
    # since a score of -1e5 leaves few bits.
    weights = (logs - logs.logsumexp(1, keepdim=True)).exp()
    return (out * weights.to(out.dtype)).sum(1)
